// The list of update rules. Adding one to the library: write its header, name it here.
#pragma once

#include "core/math/accumulator.h"
#include "core/math/adagrad.h"
#include "core/math/adam.h"
#include "core/math/adgd.h"
#include "core/math/clip21.h"
#include "core/math/ef21.h"
#include "core/math/ef21_plus.h"
#include "core/math/ef_sgd.h"
#include "core/math/normalized_sgd.h"
#include "core/math/scale.h"
#include "core/math/sgd.h"
#include "core/math/sign.h"
#include "core/math/stm.h"
#include "core/rule.h"

PYSMOOTH_KERNELS_BEGIN

using Rules =
    RuleList<Scale, Sgd<0>, Sgd<1>, Adagrad, Adam<0>, Adam<1>, Sign<0>, Sign<1>, ScaledSign<0>,
             ScaledSign<1>, Lion, Stm, AdGd, NormalizedSgd, NormAccumulator<0>, NormAccumulator<1>,
             Accumulator<0>, Accumulator<1>, Clip21<0>, Clip21<0, true>, Clip21<1>, Clip21<1, true>,
             EfSgd<0, false>, EfSgd<1, false>, EfSgd<0, true>, EfSgd<1, true>, EfSign<0>, EfSign<1>,
             Ef21<0, Ef21Form::dense>, Ef21<1, Ef21Form::dense>, Ef21<2, Ef21Form::dense>,
             Ef21<0, Ef21Form::select>, Ef21<1, Ef21Form::select>, Ef21<2, Ef21Form::select>,
             Ef21<0, Ef21Form::select_normalized>, Ef21<1, Ef21Form::select_normalized>,
             Ef21<2, Ef21Form::select_normalized>, Ef21Plus<0>, Ef21Plus<1>>;

PYSMOOTH_KERNELS_END

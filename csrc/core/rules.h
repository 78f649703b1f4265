// The list of update rules. Adding one to the library: write its header, name it here.
#pragma once

#include "core/math/adagrad.h"
#include "core/math/adam.h"
#include "core/math/scale.h"
#include "core/math/sgd.h"
#include "core/math/sign.h"
#include "core/rule.h"

PYSMOOTH_KERNELS_BEGIN

using Rules = RuleList<Scale, Sgd<0>, Sgd<1>, Adagrad, Adam<0>, Adam<1>, Sign<0>, Sign<1>, Lion>;

PYSMOOTH_KERNELS_END

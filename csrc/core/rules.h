// The list of update rules. Adding one to the library: write its header, name it here.
#pragma once

#include "core/math/scale.h"
#include "core/math/sgd.h"
#include "core/rule.h"

PYSMOOTH_KERNELS_BEGIN

using Rules = RuleList<Scale, Sgd<0>, Sgd<1>>;

PYSMOOTH_KERNELS_END

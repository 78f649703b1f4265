// What an update rule is made of.
//
// A rule is a struct with
//   kName         its name, the same in every backend
//   kHyper        names of its hyper-parameters, in the order they are passed
//   kReadsGrad    false if it rewrites a single stream in place (Scale)
//   kStates       number of state tensors
//   Hyper<T>      the constants of one tensor's update, in the compute type
//   prepare<T>()  makes them from the hyper-parameters and the scalars that reduce left behind
//   update()      one element, or one vector of elements, in registers
// The driver of each backend owns loading and storing, dtypes, tails and layouts; a rule never sees
// a pointer. See math/sgd.h.
#pragma once

#include "core/config.h"

namespace pysmooth {

// What the reduce stage hands to apply, per tensor.
struct Scalars {
  double grad_coef = 1.0;  // the clip coefficient
  bool first = false;      // this is the tensor's first step: its states hold nothing yet
};

}  // namespace pysmooth

PYSMOOTH_KERNELS_BEGIN

// One element of every stream of a rule. V is float, double, or a SIMD vector of them.
template <class V, int kStates>
struct Lane {
  V param;
  V grad;
  V state[kStates > 0 ? kStates : 1];
};

// The few operations that read differently on scalars and on SIMD vectors; backends specialise it.
template <class V>
struct ops {
  PYSMOOTH_HD static V select(bool mask, V yes, V no) { return mask ? yes : no; }
};

// NaN passes through, as it does in torch.clamp.
template <class V>
PYSMOOTH_HD V clamp_magnitude(V x, V bound) {
  return ops<V>::select(x > bound, bound, ops<V>::select(x < -bound, -bound, x));
}

template <class... Rules>
struct RuleList {};

PYSMOOTH_KERNELS_END

// What an update rule is made of.
//
// A rule is a struct, derived from RuleDefaults, with
//   kName         its name, the same in every backend
//   kHyper        names of its hyper-parameters, in the order they are passed
//   kStates       number of state tensors
//   kReadsGrad    false if it rewrites a single stream in place (Scale)
//   kCountsSteps  true if it depends on how many steps a tensor has seen
//   derive()      what depends on hyper-parameters and step count alone: once for all tensors
//   Hyper<T>      the constants of one tensor's update, in the compute type
//   prepare<T>()  makes them from the hyper-parameters and the scalars
//   update()      one element, or one vector of elements, in registers
// The driver of each backend owns loading and storing, dtypes, tails and layouts, and what becomes
// of the gradient before a rule sees it (clip, clamp, sign); a rule never sees a pointer. See
// math/sgd.h.
#pragma once

#include <cmath>

#include "core/config.h"

namespace pysmooth {

constexpr int kMaxDerived = 4;

// What apply is told about a tensor, apart from the hyper-parameters.
struct Scalars {
  double grad_coef = 1.0;    // the clip coefficient, from reduce; negative to ascend
  double clip_value = -1.0;  // bound of the gradient's coordinates; negative or NaN: none
  bool first = false;        // this is the tensor's first step: its states hold nothing yet
  double derived[kMaxDerived] = {};
};

}  // namespace pysmooth

PYSMOOTH_KERNELS_BEGIN

struct RuleDefaults {
  static constexpr bool kReadsGrad = true;
  static constexpr bool kCountsSteps = false;
  static void derive(const double* /*hyper*/, double /*step*/, double* /*derived*/) {}
};

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
  PYSMOOTH_HD static V sqrt(V x) { return std::sqrt(x); }
};

// NaN passes through, as it does in torch.clamp.
template <class V>
PYSMOOTH_HD V clamp_magnitude(V x, V bound) {
  return ops<V>::select(x > bound, bound, ops<V>::select(x < -bound, -bound, x));
}

// -1, 0 or 1. Zeros keep their sign, NaN passes through.
template <class V>
PYSMOOTH_HD V sign_of(V x) {
  const V one = V{} + 1;
  return ops<V>::select(x > V{}, one, ops<V>::select(x < V{}, -one, x));
}

// What becomes of a gradient before its rule sees it.
template <class T>
struct GradientIn {
  T coef, bound;
  bool clamp;

  PYSMOOTH_HD explicit GradientIn(const Scalars& s)
      : coef(static_cast<T>(s.grad_coef)),
        bound(static_cast<T>(s.clip_value)),
        clamp(s.clip_value >= 0.0) {}

  template <class V>
  PYSMOOTH_HD V operator()(V grad) const {
    const V g = grad * coef;
    return clamp ? clamp_magnitude<V>(g, V{} + bound) : g;
  }
};

template <class... Rules>
struct RuleList {};

PYSMOOTH_KERNELS_END

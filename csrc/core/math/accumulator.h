// AdaGrad and Adam as the theory of heavy-tailed noise has them, of a gradient g that is already
// clipped: no bias correction, and an accumulator that starts from b_init^2 > 0.
//
//   m = beta1 * m + (1 - beta1) * g                      (m = g where there is no momentum)
//   b2 = keep * b2 + admit * ||g||^2                     (norm version: one number per scope unit)
//   b2 = keep * b2 + admit * g^2                         (coordinate-wise: a state)
//   p = (1 - lr * weight_decay) * p - lr * m / (sqrt(b2) + eps)
//
// A delayed version divides by the b2 of before.
#pragma once

#include "core/rule.h"

PYSMOOTH_KERNELS_BEGIN

template <int kMomentum>  // 0 or 1
struct NormAccumulator : RuleDefaults {
  static constexpr const char* kName = kMomentum ? "norm_accumulator_momentum" : "norm_accumulator";
  static constexpr const char* kHyper[] = {"lr",    "beta1",   "keep",
                                           "admit", "delayed", "weight_decay"};
  static constexpr int kStates = kMomentum;
  static constexpr bool kAccumulates = true;

  template <class T>
  struct Hyper {
    T beta1, admit, shrink, step;
  };

  PYSMOOTH_HD static double accumulate(const double* h, double norm_sq, double sum_squares) {
    return h[2] * norm_sq + h[3] * sum_squares;
  }

  template <class T>
  PYSMOOTH_HD static Hyper<T> prepare(const double* h, const Scalars& s) {
    const double norm_sq = h[4] != 0.0 ? s.norm_sq_before : s.norm_sq;
    const double step = norm_sq == 0.0 ? 0.0 : h[0] / std::sqrt(norm_sq);
    return {static_cast<T>(h[1]), static_cast<T>(1.0 - h[1]), static_cast<T>(1.0 - h[0] * h[5]),
            static_cast<T>(step)};
  }

  template <class V, class T>
  PYSMOOTH_HD static void update(Lane<V, kStates>& x, const Hyper<T>& h) {
    V m = x.grad;
    if constexpr (kMomentum != 0) m = x.state[0] = x.state[0] * h.beta1 + m * h.admit;
    x.param = x.param * h.shrink - m * h.step;
  }
};

template <int kMomentum>  // 0 or 1
struct Accumulator : RuleDefaults {
  static constexpr const char* kName = kMomentum ? "accumulator_momentum" : "accumulator";
  static constexpr const char* kHyper[] = {"lr",      "beta1", "keep",        "admit",
                                           "delayed", "eps",   "weight_decay"};
  static constexpr int kStates = 1 + kMomentum;  // b2, then m

  template <class T>
  struct Hyper {
    T lr, beta1, admit1, keep, admit, eps, shrink;
    bool delayed;
  };

  template <class T>
  PYSMOOTH_HD static Hyper<T> prepare(const double* h, const Scalars& /*s*/) {
    return {static_cast<T>(h[0]),
            static_cast<T>(h[1]),
            static_cast<T>(1.0 - h[1]),
            static_cast<T>(h[2]),
            static_cast<T>(h[3]),
            static_cast<T>(h[5]),
            static_cast<T>(1.0 - h[0] * h[6]),
            h[4] != 0.0};
  }

  template <class V, class T>
  PYSMOOTH_HD static void update(Lane<V, kStates>& x, const Hyper<T>& h) {
    const V g = x.grad;
    const V before = x.state[0];
    x.state[0] = before * h.keep + g * g * h.admit;
    V m = g;
    if constexpr (kMomentum != 0) m = x.state[1] = x.state[1] * h.beta1 + g * h.admit1;
    const V root = ops<V>::sqrt(h.delayed ? before : x.state[0]);
    x.param = x.param * h.shrink - m * h.lr / (root + h.eps);
  }
};

PYSMOOTH_KERNELS_END

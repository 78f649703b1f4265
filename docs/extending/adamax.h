// Adamax, torch.optim's update of a gradient g that is already clipped:
//
//   g = g + weight_decay * p
//   m = beta1 * m + (1 - beta1) * g
//   u = max(beta2 * u, |g| + eps)
//   p = p - lr / (1 - beta1^step) * m / u
#pragma once

#include "core/rule.h"

PYSMOOTH_KERNELS_BEGIN

struct Adamax : RuleDefaults {
  static constexpr const char* kName = "adamax";
  static constexpr const char* kHyper[] = {"lr", "beta1", "beta2", "eps", "weight_decay"};
  static constexpr int kStates = 2;
  static constexpr bool kCountsSteps = true;

  template <class T>
  struct Hyper {
    T beta1, admit1, beta2, eps, decay, lr;
    bool decays;
  };

  // In double, once per step.
  PYSMOOTH_HD static void derive(const double* h, double step, double* derived) {
    derived[0] = h[0] / (1.0 - std::pow(h[1], step));
  }

  template <class T>
  PYSMOOTH_HD static Hyper<T> prepare(const double* h, const Scalars& s) {
    return {static_cast<T>(h[1]), static_cast<T>(1.0 - h[1]), static_cast<T>(h[2]),
            static_cast<T>(h[3]), static_cast<T>(h[4]),       static_cast<T>(s.derived[0]),
            h[4] != 0.0};
  }

  // One element, or one vector of elements, in registers.
  template <class V, class T>
  PYSMOOTH_HD static void update(Lane<V, kStates>& x, const Hyper<T>& h) {
    V g = x.grad;
    if (h.decays) g = g + x.param * h.decay;
    x.state[0] = x.state[0] * h.beta1 + g * h.admit1;
    const V held = x.state[1] * h.beta2, fresh = magnitude_of<V>(g) + h.eps;
    // NaN wins, as in torch.maximum.
    x.state[1] = ops<V>::select(held > fresh, held, ops<V>::select(held != held, held, fresh));
    x.param = x.param - x.state[0] * h.lr / x.state[1];
  }
};

PYSMOOTH_KERNELS_END

// AdaGrad, torch.optim.Adagrad's update of a gradient g that is already clipped:
//
//   g = g + weight_decay * p
//   sum = sum + g^2
//   p = p - lr / (1 + (step - 1) * lr_decay) * g / (sqrt(sum) + eps)
#pragma once

#include "core/rule.h"

PYSMOOTH_KERNELS_BEGIN

struct Adagrad : RuleDefaults {
  static constexpr const char* kName = "adagrad";
  static constexpr const char* kHyper[] = {"lr", "lr_decay", "eps", "weight_decay"};
  static constexpr int kStates = 1;
  static constexpr bool kCountsSteps = true;
  static constexpr unsigned kLowStates = 1u;

  template <class T>
  struct Hyper {
    T lr, eps, decay;
    bool decays;
  };

  PYSMOOTH_HD static void derive(const double* h, double step, double* derived) {
    derived[0] = h[0] / (1.0 + (step - 1.0) * h[1]);
  }

  template <class T>
  PYSMOOTH_HD static Hyper<T> prepare(const double* h, const Scalars& s) {
    return {static_cast<T>(s.derived[0]), static_cast<T>(h[2]), static_cast<T>(h[3]), h[3] != 0.0};
  }

  template <class V, class T>
  PYSMOOTH_HD static void update(Lane<V, kStates>& x, const Hyper<T>& h) {
    V g = x.grad;
    if (h.decays) g = g + x.param * h.decay;
    x.state[0] = x.state[0] + g * g;
    x.param = x.param - g * h.lr / (ops<V>::sqrt(x.state[0]) + h.eps);
  }
};

PYSMOOTH_KERNELS_END

// Adam and AdamW, torch.optim's updates of a gradient g that is already clipped:
//
//   p = (1 - lr * weight_decay) * p        (decoupled decay: AdamW)
//   g = g + weight_decay * p               (coupled decay: Adam)
//   m = beta1 * m + (1 - beta1) * g
//   v = beta2 * v + (1 - beta2) * g^2
//   w = max(w, v)  with amsgrad, else  v
//   p = p - lr / (1 - beta1^step) * m / (sqrt(w) / sqrt(1 - beta2^step) + eps)
#pragma once

#include "core/rule.h"

PYSMOOTH_KERNELS_BEGIN

template <int kAmsgrad>  // 0 or 1
struct Adam : RuleDefaults {
  static constexpr const char* kName = kAmsgrad ? "adam_amsgrad" : "adam";
  static constexpr const char* kHyper[] = {"lr",  "beta1",        "beta2",
                                           "eps", "weight_decay", "decoupled_weight_decay"};
  static constexpr int kStates = 2 + kAmsgrad;
  static constexpr bool kCountsSteps = true;
  static constexpr unsigned kLowStates = 3u;  // a maximum of noisy numbers would drift up

  template <class T>
  struct Hyper {
    T beta1, admit1, beta2, admit2, eps, decay, shrink, lr, root;
    bool decays;
  };

  PYSMOOTH_HD static void derive(const double* h, double step, double* derived) {
    derived[0] = h[0] / (1.0 - std::pow(h[1], step));
    derived[1] = 1.0 / std::sqrt(1.0 - std::pow(h[2], step));
  }

  template <class T>
  PYSMOOTH_HD static Hyper<T> prepare(const double* h, const Scalars& s) {
    const double lr = h[0], beta1 = h[1], beta2 = h[2], weight_decay = h[4];
    const bool decoupled = h[5] != 0.0;
    Hyper<T> out;
    out.beta1 = static_cast<T>(beta1);
    out.admit1 = static_cast<T>(1.0 - beta1);
    out.beta2 = static_cast<T>(beta2);
    out.admit2 = static_cast<T>(1.0 - beta2);
    out.eps = static_cast<T>(h[3]);
    out.decay = static_cast<T>(weight_decay);
    out.decays = weight_decay != 0.0 && !decoupled;
    out.shrink = static_cast<T>(decoupled ? 1.0 - lr * weight_decay : 1.0);
    out.lr = static_cast<T>(s.derived[0]);
    out.root = static_cast<T>(s.derived[1]);
    return out;
  }

  template <class V, class T>
  PYSMOOTH_HD static void update(Lane<V, kStates>& x, const Hyper<T>& h) {
    V g = x.grad;
    if (h.decays) g = g + x.param * h.decay;
    x.state[0] = x.state[0] * h.beta1 + g * h.admit1;
    x.state[1] = x.state[1] * h.beta2 + g * g * h.admit2;
    V top = x.state[1];
    if constexpr (kAmsgrad != 0) {
      // NaN wins, as in torch.maximum.
      const V held = ops<V>::select(x.state[2] != x.state[2], x.state[2], top);
      top = ops<V>::select(x.state[2] > top, x.state[2], held);
      x.state[2] = top;
    }
    const V denominator = ops<V>::sqrt(top) * h.root + h.eps;
    x.param = x.param * h.shrink - x.state[0] * h.lr / denominator;
  }
};

PYSMOOTH_KERNELS_END

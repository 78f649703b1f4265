// Stochastic gradient descent, torch.optim.SGD's update of a gradient g that is already clipped:
//
//   g = g + weight_decay * p     (coupled decay: after the clip, before the momentum)
//   m = momentum * m + (1 - dampening) * g          (m = g on the first step)
//   g = g + momentum * m  if nesterov else  m
//   p = (1 - lr * weight_decay) * p - lr * g        (the factor with decoupled decay only)
#pragma once

#include "core/rule.h"

PYSMOOTH_KERNELS_BEGIN

template <int kMomentum>  // 0 or 1: whether there is a momentum buffer
struct Sgd : RuleDefaults {
  static constexpr const char* kName = kMomentum ? "sgd_momentum" : "sgd";
  static constexpr const char* kHyper[] = {"lr",       "momentum",     "dampening",
                                           "nesterov", "weight_decay", "decoupled_weight_decay"};
  static constexpr int kStates = kMomentum;

  template <class T>
  struct Hyper {
    T decay, keep, admit, look, shrink, lr;
    bool decays, nesterov;
  };

  template <class T>
  PYSMOOTH_HD static Hyper<T> prepare(const double* h, const Scalars& s) {
    const double lr = h[0], momentum = h[1], dampening = h[2], weight_decay = h[4];
    const bool decoupled = h[5] != 0.0;
    Hyper<T> out;
    out.decay = static_cast<T>(weight_decay);
    out.decays = weight_decay != 0.0 && !decoupled;
    out.keep = static_cast<T>(s.first ? 0.0 : momentum);
    out.admit = static_cast<T>(s.first ? 1.0 : 1.0 - dampening);
    out.look = static_cast<T>(momentum);
    out.nesterov = h[3] != 0.0;
    out.shrink = static_cast<T>(decoupled ? 1.0 - lr * weight_decay : 1.0);
    out.lr = static_cast<T>(lr);
    return out;
  }

  template <class V, class T>
  PYSMOOTH_HD static void update(Lane<V, kStates>& x, const Hyper<T>& h) {
    V g = x.grad;
    if (h.decays) g = g + x.param * h.decay;
    if constexpr (kMomentum != 0) {
      x.state[0] = x.state[0] * h.keep + g * h.admit;
      g = h.nesterov ? V(g + x.state[0] * h.look) : x.state[0];
    }
    x.param = x.param * h.shrink - g * h.lr;
  }
};

PYSMOOTH_KERNELS_END

// Clip21 on one worker: what is clipped is not the gradient but its distance to an estimate h,
//
//   v = (1 - beta) * v + beta * g             (Clip21Sgd2m; v = g for Clip21)
//   u = clip(v - h)                           (over a whole scope: u = (v - h) * min(1, tau /
//   norm)) h = h + beta_hat * u                      (beta_hat = 1 for Clip21) p = (1 - lr *
//   weight_decay) * p - lr * h
//
// Pass 0 takes the norm of v - h.
#pragma once

#include "core/rule.h"

PYSMOOTH_KERNELS_BEGIN

template <int kMomentum>  // 0 or 1: whether v is a state of its own
struct Clip21 : RuleDefaults {
  static constexpr const char* kName = kMomentum ? "clip21_sgd2m" : "clip21";
  static constexpr const char* kHyper[] = {"lr", "tau", "beta", "beta_hat", "weight_decay"};
  static constexpr int kStates = 1 + kMomentum;  // h, then v
  static constexpr int kStages = 1;
  static constexpr Streams kPass[1] = {{false, false, true, ~0u, 2u}};
  static constexpr Streams kApply{true, true, kMomentum == 0, ~0u, 1u};

  template <class T>
  struct Hyper {
    T keep, admit, coef, beta_hat, shrink, lr;
  };

  PYSMOOTH_HD static Sum stage_sum(const double* /*hyper*/, int /*stage*/) { return Sum::squares; }

  template <class T>
  PYSMOOTH_HD static Hyper<T> prepare(const double* h, const Scalars& s) {
    const double norm = s.stage[0];
    return {static_cast<T>(1.0 - h[2]),
            static_cast<T>(h[2]),
            static_cast<T>(norm > h[1]    ? h[1] / norm
                           : norm == norm ? 1.0
                                          : norm),
            static_cast<T>(h[3]),
            static_cast<T>(1.0 - h[0] * h[4]),
            static_cast<T>(h[0])};
  }

  template <class V, class T>
  PYSMOOTH_HD static V distance(const Lane<V, kStates>& x) {
    if constexpr (kMomentum != 0) return x.state[1] - x.state[0];
    return x.grad - x.state[0];
  }

  template <int kStage, class V, class T>
  PYSMOOTH_HD static V source(Lane<V, kStates>& x, const Hyper<T>& h) {
    if constexpr (kMomentum != 0) x.state[1] = x.state[1] * h.keep + x.grad * h.admit;
    return distance<V, T>(x);
  }

  template <class V, class T>
  PYSMOOTH_HD static void update(Lane<V, kStates>& x, const Hyper<T>& h) {
    x.state[0] = x.state[0] + distance<V, T>(x) * h.coef * h.beta_hat;
    x.param = x.param * h.shrink - x.state[0] * h.lr;
  }
};

PYSMOOTH_KERNELS_END

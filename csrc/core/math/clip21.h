// Clip21 on one worker: what is clipped is not the gradient but its distance to an estimate h,
//
//   v = (1 - beta) * v + beta * g             (Clip21Sgd2m; v = g for Clip21)
//   u = clip(v - h)                           (over a whole scope: (v - h) * min(1, tau / norm))
//   h = h + beta_hat * u                      (beta_hat = 1 for Clip21)
//   p = (1 - lr * weight_decay) * p - lr * h
//
// Pass 0 takes the norm of v - h. With noise, p follows the server's estimate instead, a state of
// its own:
//
//   s = s + beta_hat * (u + noise_std * z)    (z standard normal)
#pragma once

#include "core/rule.h"

PYSMOOTH_KERNELS_BEGIN

// kMomentum: 0 or 1, whether v is a state of its own.
template <int kMomentum, bool kNoise = false>
struct Clip21 : RuleDefaults {
  static constexpr const char* kName = kMomentum ? kNoise ? "clip21_sgd2m_noise" : "clip21_sgd2m"
                                       : kNoise  ? "clip21_noise"
                                                 : "clip21";
  static constexpr const char* kHyper[] = {"lr",           "tau",       "beta",     "beta_hat",
                                           "weight_decay", "noise_std", "seed_low", "seed_high"};
  static constexpr int kStates = 1 + kMomentum + kNoise;  // h, then v, then s
  static constexpr bool kCountsSteps = kNoise;            // noise is drawn by step
  static constexpr int kStages = 1;
  static constexpr int kLead = kNoise ? kStates - 1 : 0;  // what p follows
  static constexpr Streams kPass[1] = {
      {false, false, true, kMomentum != 0 ? 3u : 1u, kMomentum != 0 ? 2u : 0u}};
  static constexpr Streams kApply{true, true, kMomentum == 0, ~0u, 1u | 1u << kLead, kNoise};

  template <class T>
  struct Hyper {
    T keep, admit, coef, beta_hat, shrink, lr, noise;
  };

  PYSMOOTH_HD static Sum stage_sum(const double* /*hyper*/, int /*stage*/) { return Sum::squares; }
  PYSMOOTH_HD static Draw draw(const double* h) { return draw_of(Draw::normal, h[6], h[7]); }

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
            static_cast<T>(h[0]),
            static_cast<T>(h[5])};
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
    const V u = distance<V, T>(x) * h.coef;
    x.state[0] = x.state[0] + u * h.beta_hat;
    if constexpr (kNoise) x.state[kLead] = x.state[kLead] + (x.drawn * h.noise + u) * h.beta_hat;
    x.param = x.param * h.shrink - x.state[kLead] * h.lr;
  }
};

PYSMOOTH_KERNELS_END

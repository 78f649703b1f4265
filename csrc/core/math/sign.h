// Steps along signs, for a gradient g that is already clipped; sign(0) = 0, so that what was never
// touched does not drift.
//
//   SignSGD   p = (1 - lr * weight_decay) * p - lr * sign(g)
//   Signum    m = momentum * m + (1 - momentum) * g;  the same with sign(m)
//   Lion      the same with sign(beta1 * m + (1 - beta1) * g), then
//             m = beta2 * m + (1 - beta2) * g
//
// A scaled one steps along sign(d) * mean |d| of the tensor, d being g or m.
#pragma once

#include "core/rule.h"

PYSMOOTH_KERNELS_BEGIN

template <int kMomentum>  // 0 or 1: whether there is a momentum
struct Sign : RuleDefaults {
  static constexpr const char* kName = kMomentum ? "signum" : "sign_sgd";
  static constexpr const char* kHyper[] = {"lr", "momentum", "weight_decay"};
  static constexpr int kStates = kMomentum;

  template <class T>
  struct Hyper {
    T lr, keep, admit, shrink;
  };

  template <class T>
  PYSMOOTH_HD static Hyper<T> prepare(const double* h, const Scalars&) {
    return {static_cast<T>(h[0]), static_cast<T>(h[1]), static_cast<T>(1.0 - h[1]),
            static_cast<T>(1.0 - h[0] * h[2])};
  }

  template <class V, class T>
  PYSMOOTH_HD static void update(Lane<V, kStates>& x, const Hyper<T>& h) {
    V direction = x.grad;
    if constexpr (kMomentum != 0) {
      x.state[0] = x.state[0] * h.keep + x.grad * h.admit;
      direction = x.state[0];
    }
    x.param = x.param * h.shrink - sign_of<V>(direction) * h.lr;
  }
};

template <int kMomentum>
struct ScaledSign : RuleDefaults {
  static constexpr const char* kName = kMomentum ? "scaled_signum" : "scaled_sign_sgd";
  static constexpr const char* kHyper[] = {"lr", "momentum", "weight_decay"};
  static constexpr int kStates = kMomentum;
  static constexpr int kStages = 1;
  static constexpr Streams kPass[1] = {{false, false, true, ~0u, ~0u}};
  static constexpr Streams kApply{true, true, kMomentum == 0, ~0u, 0u};

  template <class T>
  struct Hyper {
    T keep, admit, shrink, step;
  };

  PYSMOOTH_HD static Sum stage_sum(const double* /*hyper*/, int /*stage*/) { return Sum::abs; }

  template <class T>
  PYSMOOTH_HD static Hyper<T> prepare(const double* h, const Scalars& s) {
    return {static_cast<T>(h[1]), static_cast<T>(1.0 - h[1]), static_cast<T>(1.0 - h[0] * h[2]),
            static_cast<T>(h[0] * s.stage[0])};
  }

  template <int kStage, class V, class T>
  PYSMOOTH_HD static V source(Lane<V, kStates>& x, const Hyper<T>& h) {
    if constexpr (kMomentum == 0) return x.grad;
    x.state[0] = x.state[0] * h.keep + x.grad * h.admit;
    return x.state[0];
  }

  template <class V, class T>
  PYSMOOTH_HD static void update(Lane<V, kStates>& x, const Hyper<T>& h) {
    V direction = x.grad;
    if constexpr (kMomentum != 0) direction = x.state[0];
    x.param = x.param * h.shrink - sign_of<V>(direction) * h.step;
  }
};

struct Lion : RuleDefaults {
  static constexpr const char* kName = "lion";
  static constexpr const char* kHyper[] = {"lr", "beta1", "beta2", "weight_decay"};
  static constexpr int kStates = 1;

  template <class T>
  struct Hyper {
    T lr, keep1, admit1, keep2, admit2, shrink;
  };

  template <class T>
  PYSMOOTH_HD static Hyper<T> prepare(const double* h, const Scalars&) {
    return {static_cast<T>(h[0]), static_cast<T>(h[1]),       static_cast<T>(1.0 - h[1]),
            static_cast<T>(h[2]), static_cast<T>(1.0 - h[2]), static_cast<T>(1.0 - h[0] * h[3])};
  }

  template <class V, class T>
  PYSMOOTH_HD static void update(Lane<V, kStates>& x, const Hyper<T>& h) {
    const V direction = x.state[0] * h.keep1 + x.grad * h.admit1;
    x.state[0] = x.state[0] * h.keep2 + x.grad * h.admit2;
    x.param = x.param * h.shrink - sign_of<V>(direction) * h.lr;
  }
};

PYSMOOTH_KERNELS_END

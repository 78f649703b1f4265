// SGD with normalised momentum, for a gradient g that is already clipped:
//
//   m = momentum * m + (1 - momentum) * g               (m = g on the first step)
//   p = (1 - lr * weight_decay) * p - lr * m / (||m|| + eps)        (nothing for m = 0)
//
// with the norm over a whole scope: pass 0 takes it and leaves the new m behind.
#pragma once

#include "core/rule.h"

PYSMOOTH_KERNELS_BEGIN

struct NormalizedSgd : RuleDefaults {
  static constexpr const char* kName = "normalized_sgd";
  static constexpr const char* kHyper[] = {"lr", "momentum", "eps", "weight_decay"};
  static constexpr int kStates = 1;
  static constexpr int kStages = 1;
  static constexpr Streams kPass[1] = {{false, false, true, 1u, 1u}};
  static constexpr Streams kApply{true, true, false, 1u, 0u};

  template <class T>
  struct Hyper {
    T keep, admit, shrink, lr;
  };

  PYSMOOTH_HD static Sum stage_sum(const double* /*hyper*/, int /*stage*/) { return Sum::squares; }

  template <class T>
  PYSMOOTH_HD static Hyper<T> prepare(const double* h, const Scalars& s) {
    const double norm = s.stage[0];
    Hyper<T> out;
    out.keep = static_cast<T>(s.first ? 0.0 : h[1]);
    out.admit = static_cast<T>(s.first ? 1.0 : 1.0 - h[1]);
    out.shrink = static_cast<T>(1.0 - h[0] * h[3]);
    out.lr = static_cast<T>(norm == 0.0 ? 0.0 : h[0] / (norm + h[2]));
    return out;
  }

  template <int kStage, class V, class T>
  PYSMOOTH_HD static V source(Lane<V, kStates>& x, const Hyper<T>& h) {
    x.state[0] = x.state[0] * h.keep + x.grad * h.admit;
    return x.state[0];
  }

  template <class V, class T>
  PYSMOOTH_HD static void update(Lane<V, kStates>& x, const Hyper<T>& h) {
    x.param = x.param * h.shrink - x.state[0] * h.lr;
  }
};

PYSMOOTH_KERNELS_END

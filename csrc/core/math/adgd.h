// AdGD: gradient descent whose step is made of how far it went last, and how the gradient changed:
//
//   size = min(grown, travel / ||g - b||)     (grown where nothing changed; b the gradient before)
//   p = p - lr * size * g ;  b = g
//
// with the norm over a whole scope, from pass 0; a tensor's first gradient has no change. `grown`
// is how large the step may be, `travel` what the change is held against, infinite in the first
// step: see pysmooth/optim/adgd.py.
#pragma once

#include "core/rule.h"

PYSMOOTH_KERNELS_BEGIN

struct AdGd : RuleDefaults {
  static constexpr const char* kName = "adgd";
  static constexpr const char* kHyper[] = {"grown", "travel", "still"};
  static constexpr int kStates = 1;
  static constexpr int kStages = 1;
  static constexpr bool kKeepsScale = true;
  static constexpr Streams kPass[1] = {{false, false, true, 1u, 0u}};
  static constexpr Streams kApply{true, true, true, 0u, 1u};

  template <class T>
  struct Hyper {
    T size, moved;
  };

  PYSMOOTH_HD static Sum stage_sum(const double* /*hyper*/, int /*stage*/) { return Sum::squares; }

  template <class T>
  PYSMOOTH_HD static Hyper<T> prepare(const double* h, const Scalars& s) {
    const double changed = s.stage[0];
    const double held = changed == 0.0 ? h[2] : h[1] / changed;
    const double size = h[0] < held ? h[0] : held;  // NaN where the change is
    return {static_cast<T>(size), static_cast<T>(s.first ? 0.0 : 1.0)};
  }

  template <int kStage, class V, class T>
  PYSMOOTH_HD static V source(Lane<V, kStates>& x, const Hyper<T>& h) {
    return (x.grad - x.state[0]) * h.moved;
  }

  template <class V, class T>
  PYSMOOTH_HD static void update(Lane<V, kStates>& x, const Hyper<T>& h) {
    x.param = x.param - x.grad * h.size;
    x.state[0] = x.grad;
  }
};

PYSMOOTH_KERNELS_END

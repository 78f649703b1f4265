// x = coef * clip coefficient * x: the second half of clip_grad_norm_.
#pragma once

#include "core/rule.h"

PYSMOOTH_KERNELS_BEGIN

struct Scale : RuleDefaults {
  static constexpr const char* kName = "scale";
  static constexpr const char* kHyper[] = {"coef"};
  static constexpr bool kReadsGrad = false;
  static constexpr int kStates = 0;

  template <class T>
  struct Hyper {
    T coef;
  };

  template <class T>
  PYSMOOTH_HD static Hyper<T> prepare(const double* h, const Scalars& s) {
    return {static_cast<T>(h[0] * s.grad_coef)};
  }

  template <class V, class T>
  PYSMOOTH_HD static void update(Lane<V, kStates>& x, const Hyper<T>& h) {
    x.param = x.param * h.coef;
  }
};

PYSMOOTH_KERNELS_END

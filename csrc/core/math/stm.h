// (L0,L1)-STM, similar triangles, along a gradient g taken at p:
//
//   z = z - step * g
//   y = keep * y + admit * z
//   p = near * y + ahead * z              (where the next gradient is wanted)
//
// y and z start at p. The weights are the method's: see pysmooth/optim/stm.py.
#pragma once

#include "core/rule.h"

PYSMOOTH_KERNELS_BEGIN

struct Stm : RuleDefaults {
  static constexpr const char* kName = "stm";
  static constexpr const char* kHyper[] = {"step", "keep", "admit", "near", "ahead"};
  static constexpr int kStates = 2;  // y, then z

  template <class T>
  struct Hyper {
    T step, keep, admit, near, ahead;
    bool first;
  };

  template <class T>
  PYSMOOTH_HD static Hyper<T> prepare(const double* h, const Scalars& s) {
    return {static_cast<T>(h[0]), static_cast<T>(h[1]), static_cast<T>(h[2]),
            static_cast<T>(h[3]), static_cast<T>(h[4]), s.first};
  }

  template <class V, class T>
  PYSMOOTH_HD static void update(Lane<V, kStates>& x, const Hyper<T>& h) {
    const V y = h.first ? x.param : x.state[0];
    const V z = h.first ? x.param : x.state[1];
    x.state[1] = z - x.grad * h.step;
    x.state[0] = y * h.keep + x.state[1] * h.admit;
    x.param = x.state[0] * h.near + x.state[1] * h.ahead;
  }
};

PYSMOOTH_KERNELS_END

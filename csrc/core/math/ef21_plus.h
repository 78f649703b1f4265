// EF21+ on one worker: of two estimates of w (the gradient, or a momentum that follows it) the one
// that is closer to it. Ties keep EF21's.
//
//   v = (1 - eta) * v + eta * g                          (w = v; without momentum w = g)
//   h = C(w) if ||w - C(w)|| < ||w - (h + C(w - h))|| else h + C(w - h)
//   p = (1 - lr * weight_decay) * p - lr * h             (or lr * h / ||h||)
//
// Pass 0 looks at w - h and pass 1 at w for what the compressor needs: a scale, or a selection,
// whose marks take the compressor's place. Passes 2 and 3 take the two errors, over the unit that
// the compressor looks at. Pass 4 changes h and takes its norm; apply steps.
#pragma once

#include "core/math/ef21.h"

PYSMOOTH_KERNELS_BEGIN

template <int kMomenta>
struct Ef21Plus : Ef21<kMomenta, Ef21Form::dense> {
  using Base = Ef21<kMomenta, Ef21Form::dense>;
  static constexpr const char* kName = kMomenta ? "ef21_plus_m" : "ef21_plus";
  static constexpr int kStates = 1 + kMomenta;
  static constexpr int kStages = 5;
  static constexpr int kMarks = 2;
  static constexpr int kScales = 2;
  static constexpr bool kOfGrad = kMomenta == 0;  // where w lies
  static constexpr unsigned kTarget = kOfGrad ? 0u : 2u;
  static constexpr Streams kPass[5] = {{false, false, true, ~0u, kTarget},
                                       {false, false, kOfGrad, kTarget, 0u},
                                       {false, false, kOfGrad, 1u | kTarget, 0u, true, 1u},
                                       {false, false, kOfGrad, kTarget, 0u, true, 2u},
                                       {false, false, kOfGrad, 1u | kTarget, 1u, true, 3u}};

  template <class T>
  struct Hyper {
    typename Base::template Hyper<T> base;
    Compressor<T> direct;
    bool marked, takes_direct;
  };
  template <int kPass, class T>
  PYSMOOTH_HD static Compressor<T>& compressor(Hyper<T>& h) {
    if constexpr (kPass == 0) return h.base.compressor;
    return h.direct;
  }

  PYSMOOTH_HD static bool selects_nothing(const double* h) {
    return compressor_kind(h[4]) != CompressorKind::marks;
  }
  PYSMOOTH_HD static Sum stage_sum(const double* h, int stage) {
    if (stage < 2) return compressor_sum(h[4]);
    return stage < 4 || h[3] != 0.0 ? Sum::squares : Sum::none;
  }

  template <class T>
  PYSMOOTH_HD static Hyper<T> prepare(const double* h, const Scalars& s) {
    const bool marked = !selects_nothing(h);
    Hyper<T> out{Base::template prepare<T>(h, s),
                 Compressor<T>(h + 4, marked ? s.mark_scale : s.stage[1]), marked,
                 s.stage[3] < s.stage[2]};
    if (marked) out.base.compressor = out.direct;
    out.base.step = Base::template step_of<T>(h, s.stage[4]);
    return out;
  }

  template <class V>
  PYSMOOTH_HD static V target(const Lane<V, kStates>& x) {
    if constexpr (kOfGrad) return x.grad;
    return x.state[kMomenta];
  }

  // The two estimates.
  template <class V, class T>
  PYSMOOTH_HD static V through(const Lane<V, kStates>& x, const Hyper<T>& h) {
    return x.state[0] + h.base.compressor(target(x) - x.state[0], h.marked ? x.marked[0] : x.drawn);
  }
  template <class V, class T>
  PYSMOOTH_HD static V direct(const Lane<V, kStates>& x, const Hyper<T>& h) {
    return h.direct(target(x), h.marked ? x.marked[1] : x.drawn);
  }

  template <int kStage, class V, class T>
  PYSMOOTH_HD static V source(Lane<V, kStates>& x, const Hyper<T>& h) {
    if constexpr (kStage == 0) return Base::template source<0>(x, h.base);
    if constexpr (kStage == 1) return target(x);
    if constexpr (kStage == 2) return target(x) - through(x, h);
    if constexpr (kStage == 3) return target(x) - direct(x, h);
    if constexpr (kStage == 4) x.state[0] = h.takes_direct ? direct(x, h) : through(x, h);
    return x.state[0];
  }

  template <int kStage, class V, class T>
  PYSMOOTH_HD static V again(const Lane<V, kStates>& x, const Hyper<T>&) {
    return kStage == 0 ? target(x) - x.state[0] : target(x);
  }

  template <class V, class T>
  PYSMOOTH_HD static void update(Lane<V, kStates>& x, const Hyper<T>& h) {
    Base::update(x, h.base);
  }
};

PYSMOOTH_KERNELS_END

// EF21 on one worker: the difference between the gradient and an estimate h is compressed, and h
// moves by what came through:
//
//   v = (1 - eta) * v + eta * g ;  u = (1 - eta) * u + eta * v     (as many as there are momenta)
//   h = h + C(w - h)                                               (w = g, v or u)
//   p = (1 - lr * weight_decay) * p - lr * h                       (or lr * h / ||h||)
//
// Dense compressors: pass 0 takes the scale of w - h, pass 1 changes h and takes its norm, apply
// steps. Selecting ones change h at few places. Where nothing is normalised pass 0 then already
// steps along the old h, and the chosen coordinates are repaired, p = p - lr * c: one pass for all.
// Where it is, pass 1 takes the norm of the repaired h.
#pragma once

#include "core/compress.h"
#include "core/rule.h"

PYSMOOTH_KERNELS_BEGIN

enum class Ef21Form { dense, select, select_normalized };

template <int kMomenta, Ef21Form kForm>
struct Ef21 : RuleDefaults {
  static constexpr bool kSelects = kForm != Ef21Form::dense;
  static constexpr bool kOnePass = kForm == Ef21Form::select;
  static constexpr int kScales = kSelects ? 0 : 1;
  static constexpr const char* kNames[3][3] = {
      {"ef21_dense", "ef21_dense_m", "ef21_dense_2m"},
      {"ef21_select", "ef21_select_m", "ef21_select_2m"},
      {"ef21_select_normalized", "ef21_select_normalized_m", "ef21_select_normalized_2m"}};
  static constexpr const char* kName = kNames[static_cast<int>(kForm)][kMomenta];
  static constexpr const char* kHyper[] = {"lr",         "eta",   "weight_decay", "normalize",
                                           "compressor", "level", "seed_low",     "seed_high"};
  static constexpr int kStates = 1 + kMomenta;  // h, then v, then u
  static constexpr bool kCountsSteps = true;    // random compressors draw by step
  static constexpr int kStages = kOnePass ? 1 : 2;
  static constexpr bool kApplies = !kOnePass;
  static constexpr Streams kPass[2] = {
      {kOnePass, kOnePass, true, ~0u, ~1u},
      {false, false, !kSelects && kMomenta == 0, kSelects ? 1u : 1u | 1u << kMomenta,
       kSelects ? 0u : 1u, !kSelects}};
  static constexpr Streams kApply{true, true, false, 1u, 0u};
  static constexpr Streams kSelected{kOnePass, kOnePass, false, 1u, 1u};
  static constexpr Streams kAgain{false, false, kMomenta == 0, 1u | 1u << kMomenta, 0u};

  template <class T>
  struct Hyper {
    T keep, admit, shrink, lr, step;
    Compressor<T> compressor;
  };
  template <int kPass, class T>
  PYSMOOTH_HD static Compressor<T>& compressor(Hyper<T>& h) {
    return h.compressor;
  }

  PYSMOOTH_HD static Sum stage_sum(const double* h, int stage) {
    if (stage == 0) return kSelects ? Sum::none : compressor_sum(h[4]);
    return h[3] != 0.0 ? Sum::squares : Sum::none;
  }

  PYSMOOTH_HD static Draw draw(const double* h) { return compressor_draw(h + 4); }

  template <class T>
  PYSMOOTH_HD static Hyper<T> prepare(const double* h, const Scalars& s) {
    return {static_cast<T>(1.0 - h[1]),        static_cast<T>(h[1]),
            static_cast<T>(1.0 - h[0] * h[2]), static_cast<T>(h[0]),
            step_of<T>(h, s.stage[1]),         Compressor<T>(h + 4, s.stage[0])};
  }
  template <class T>
  PYSMOOTH_HD static T step_of(const double* h, double norm) {
    return static_cast<T>(h[3] == 0.0 ? h[0] : norm == 0.0 ? 0.0 : h[0] / norm);
  }

  // w - h, the momenta being up to date.
  template <class V>
  PYSMOOTH_HD static V distance(const Lane<V, kStates>& x) {
    if constexpr (kMomenta == 0) return x.grad - x.state[0];
    return x.state[kMomenta] - x.state[0];
  }

  template <int kStage, class V, class T>
  PYSMOOTH_HD static V source(Lane<V, kStates>& x, const Hyper<T>& h) {
    if constexpr (kStage == 0) {
      V w = x.grad;
      for (int k = 1; k <= kMomenta; ++k) w = x.state[k] = x.state[k] * h.keep + w * h.admit;
      if constexpr (kOnePass) x.param = x.param * h.shrink - x.state[0] * h.lr;
      return distance(x);
    }
    if constexpr (!kSelects) x.state[0] = x.state[0] + h.compressor(distance(x), x.drawn);
    return x.state[0];
  }

  template <int kStage, class V, class T>
  PYSMOOTH_HD static V again(const Lane<V, kStates>& x, const Hyper<T>&) {
    return distance(x);
  }

  template <class V, class T>
  PYSMOOTH_HD static void selected(Lane<V, kStates>& x, V c, const Hyper<T>& h) {
    x.state[0] = x.state[0] + c;
    if constexpr (kOnePass) x.param = x.param - c * h.lr;
  }

  template <class V, class T>
  PYSMOOTH_HD static void update(Lane<V, kStates>& x, const Hyper<T>& h) {
    x.param = x.param * h.shrink - x.state[0] * h.step;
  }
};

PYSMOOTH_KERNELS_END

// SGD with error feedback: a compressor C, and a residual e that keeps what it lost, in the units
// of the parameter:
//
//   g = g + weight_decay * p ;  m = momentum * m + g       (where asked for; g = m)
//   v = e + lr * g ;  c = C(v) ;  p = p - c ;  e = v - c
//
// Pass 0 leaves v where e was. Dense compressors do the rest in apply. Selecting ones (top-k,
// rand-k) touch nothing but the chosen coordinates. With lr = 0 nothing is sent, and e stays.
#pragma once

#include "core/compress.h"
#include "core/rule.h"

PYSMOOTH_KERNELS_BEGIN

template <int kMomentum, bool kSelect>
struct EfSgd : RuleDefaults {
  static constexpr const char* kName =
      kSelect ? (kMomentum ? "ef_sgd_select_momentum" : "ef_sgd_select")
              : (kMomentum ? "ef_sgd_dense_momentum" : "ef_sgd_dense");
  static constexpr const char* kHyper[] = {"lr",    "momentum", "weight_decay", "compressor",
                                           "level", "seed_low", "seed_high"};
  static constexpr int kStates = 1 + kMomentum;  // e, then m
  static constexpr unsigned kLowStates = 1;
  static constexpr bool kKeepsValue = true;
  static constexpr bool kCountsSteps = true;  // random compressors draw by step
  static constexpr int kStages = 1;
  static constexpr bool kSelects = kSelect;
  static constexpr int kScales = kSelect ? 0 : 1;
  static constexpr bool kApplies = !kSelect;
  static constexpr bool kAbsorbs = kMomentum == 0;
  // The parameter is read for weight decay only: see reads_param().
  static constexpr Streams kPass[1] = {{true, false, true, ~0u, ~0u}};
  static constexpr Streams kApply{true, true, false, 1u, 1u, !kSelect};
  static constexpr Streams kSelected{true, true, false, 1u, 1u};
  static constexpr Streams kAgain{false, false, false, 1u, 0u};

  template <class T>
  struct Hyper {
    T lr, momentum, decay;
    bool decays, frozen;
    Compressor<T> compressor;
  };
  template <int kPass, class T>
  PYSMOOTH_HD static Compressor<T>& compressor(Hyper<T>& h) {
    return h.compressor;
  }

  PYSMOOTH_HD static Sum stage_sum(const double* h, int /*stage*/) {
    return kSelect || h[0] == 0.0 ? Sum::none : compressor_sum(h[3]);
  }
  PYSMOOTH_HD static Draw draw(const double* h) {
    return h[0] == 0.0 ? Draw{} : compressor_draw(h + 3);
  }
  PYSMOOTH_HD static bool reads_param(const double* h, int /*stage*/) { return h[2] != 0.0; }
  PYSMOOTH_HD static bool selects_nothing(const double* h) { return h[0] == 0.0; }

  template <class T>
  PYSMOOTH_HD static Hyper<T> prepare(const double* h, const Scalars& s) {
    return {static_cast<T>(h[0]), static_cast<T>(h[1]), static_cast<T>(h[2]),
            h[2] != 0.0,          h[0] == 0.0,          Compressor<T>(h + 3, s.stage[0])};
  }

  template <int kStage, class V, class T>
  PYSMOOTH_HD static V source(Lane<V, kStates>& x, const Hyper<T>& h) {
    V g = x.grad;
    if (h.decays) g = g + x.param * h.decay;
    if constexpr (kMomentum != 0) g = x.state[1] = x.state[1] * h.momentum + g;
    x.state[0] = x.state[0] + g * h.lr;
    return x.state[0];
  }

  template <int kStage, class V, class T>
  PYSMOOTH_HD static V again(const Lane<V, kStates>& x, const Hyper<T>&) {
    return x.state[0];
  }

  template <class V, class T>
  PYSMOOTH_HD static void selected(Lane<V, kStates>& x, V c, const Hyper<T>&) {
    x.param = x.param - c;
    x.state[0] = x.state[0] - c;
  }

  template <class V, class T>
  PYSMOOTH_HD static void update(Lane<V, kStates>& x, const Hyper<T>& h) {
    if (h.frozen) return;
    const V c = h.compressor(x.state[0], x.drawn);
    x.param = x.param - c;
    x.state[0] = x.state[0] - c;
  }
};

// The same with the scaled sign. What went into the compressor, v, is kept in place of the
// residual, and the scale beside it: the residual v - C(v) is made again where it is needed, in
// registers. Apply needs no more of v than its signs, and writes nothing but the parameter.
template <int kMomentum>
struct EfSign : RuleDefaults {
  static constexpr const char* kName = kMomentum ? "ef_sgd_sign_momentum" : "ef_sgd_sign";
  static constexpr const char* kHyper[] = {"lr", "momentum", "weight_decay"};
  static constexpr int kStates = 1 + kMomentum;  // v, then m
  static constexpr unsigned kLowStates = 1;
  static constexpr bool kKeepsValue = true;
  static constexpr bool kKeepsScale = true;
  static constexpr bool kSendsSigns = true;
  static constexpr bool kCountsSteps = true;
  static constexpr int kStages = 1;
  static constexpr bool kAbsorbs = kMomentum == 0;
  static constexpr Streams kPass[1] = {{true, false, true, ~0u, ~0u}};
  static constexpr Streams kApply{true, true, false, 0u, 0u};
  static constexpr Streams kAgain{false, false, false, 1u, 0u};

  template <class T>
  struct Hyper {
    T lr, momentum, decay, last, scale;
    bool decays, frozen;
  };

  PYSMOOTH_HD static Sum stage_sum(const double* h, int /*stage*/) {
    return h[0] == 0.0 ? Sum::none : Sum::abs;
  }
  PYSMOOTH_HD static bool reads_param(const double* h, int /*stage*/) { return h[2] != 0.0; }

  template <class T>
  PYSMOOTH_HD static Hyper<T> prepare(const double* h, const Scalars& s) {
    return {static_cast<T>(h[0]),
            static_cast<T>(h[1]),
            static_cast<T>(h[2]),
            static_cast<T>(s.last_scale),
            static_cast<T>(s.stage[0]),
            h[2] != 0.0,
            h[0] == 0.0};
  }

  template <int kStage, class V, class T>
  PYSMOOTH_HD static V source(Lane<V, kStates>& x, const Hyper<T>& h) {
    V g = x.grad;
    if (h.decays) g = g + x.param * h.decay;
    if constexpr (kMomentum != 0) g = x.state[1] = x.state[1] * h.momentum + g;
    x.state[0] = x.state[0] - scaled_sign<V, T>(x.state[0], h.last) + g * h.lr;
    return x.state[0];
  }

  template <int kStage, class V, class T>
  PYSMOOTH_HD static V again(const Lane<V, kStates>& x, const Hyper<T>&) {
    return x.state[0];
  }

  template <class V, class T>
  PYSMOOTH_HD static void update(Lane<V, kStates>& x, const Hyper<T>& h) {
    if (!h.frozen) x.param = x.param - x.grad * h.scale;
  }
};

PYSMOOTH_KERNELS_END

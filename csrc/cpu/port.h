// Loads and stores the streams that a rule's kernel touches, a vector at a time.
#pragma once

#include <type_traits>

#include "cpu/draw.h"
#include "cpu/staging.h"

PYSMOOTH_KERNELS_BEGIN

template <class Rule, class C>
struct Port {
  using Vector = Lane<vec<C>, Rule::kStates>;
  using io = vector_io<C>;

  // A copy: a compiler that sees the buffers escape would load these pointers again and again.
  C* at[2 + Rule::kStates];
  const GradientIn<C> take;
  const C* const drawn;  // null: nothing is

  PYSMOOTH_HD Port(C* const* operand, const Scalars& scalars, const C* drawn_ = nullptr)
      : take(scalars), drawn(drawn_) {
    for (int k = 0; k < 2 + Rule::kStates; ++k) at[k] = operand[k];
  }

  template <class Use>
  PYSMOOTH_HD Vector load(int64_t i, bool reads_param = true) const {
    constexpr Touch kUse = touch_of<Rule>(Use::kStreams);
    Vector x{};
    if constexpr ((kUse.reads & 1u) != 0)
      if (reads_param) x.param = io::load(at[0] + i);
    if constexpr ((kUse.reads & 2u) != 0) x.grad = take(io::load(at[1] + i));
    for (int k = 0; k < Rule::kStates; ++k)
      if (kUse.reads >> (2 + k) & 1u) x.state[k] = io::load(at[2 + k] + i);
    if constexpr (Use::kStreams.draws)
      if (drawn != nullptr) x.drawn = io::load(drawn + i);
    return x;
  }
  template <class Use>
  PYSMOOTH_HD void store(const Vector& x, int64_t i) const {
    constexpr Touch kUse = touch_of<Rule>(Use::kStreams);
    if constexpr ((kUse.writes & 1u) != 0) io::store(at[0] + i, x.param);
    for (int k = 0; k < Rule::kStates; ++k)
      if (kUse.writes >> (2 + k) & 1u) io::store(at[2 + k] + i, x.state[k]);
  }
};

// The same for linear chunks of float parameters and gradients beside bfloat16 states: converted in
// registers, because the whole point is speed. The arithmetic, and the noise, are those of staging.
// Vectors come in order, all of them.
template <class Rule>
struct LowPort {
  static constexpr unsigned kLow = Rule::kLowStates;
  static_assert(kLow < 4u, "one word of noise serves two states");
  using Vector = Lane<vec<float>, Rule::kStates>;
  using io = vector_io<float>;

  float* param;
  const float* grad;
  void* state[Rule::kStates];
  const GradientIn<float> take;
  const NoiseKey key;
  vu32 place;

  PYSMOOTH_HD static bool fits(const ApplyArgs& a) {
    bool fits = a.stochastic == kLow << 2 && a.layout == nullptr && a.companion == 0 &&
                a.rows.coefs == nullptr;
    for (int k = 0; k < 2 + Rule::kStates; ++k)
      fits = fits && (has(kLow << 2, k) || a.dtype[k] == DType::f32);
    return fits;
  }
  PYSMOOTH_HD explicit LowPort(const ApplyArgs& a)
      : param(static_cast<float*>(a.param) + a.begin),
        grad(static_cast<const float*>(a.grad) + a.begin),
        take(a.scalars),
        key(a.noise),
        place(noise_places(static_cast<uint32_t>(a.begin))) {
    for (int k = 0; k < Rule::kStates; ++k)
      state[k] = static_cast<char*>(a.state[k]) + a.begin * itemsize(a.dtype[2 + k]);
  }

  template <class Use>
  PYSMOOTH_HD Vector load(int64_t i, bool reads_param = true) const {
    constexpr Touch kUse = touch_of<Rule>(Use::kStreams);
    Vector x{};
    if constexpr ((kUse.reads & 1u) != 0)
      if (reads_param) x.param = io::load(param + i);
    if constexpr ((kUse.reads & 2u) != 0) x.grad = take(io::load(grad + i));
    for (int k = 0; k < Rule::kStates; ++k)
      if (has(kUse.reads, 2 + k))
        x.state[k] = has(kLow, k) ? io::load(static_cast<const bf16*>(state[k]) + i)
                                  : io::load(static_cast<const float*>(state[k]) + i);
    return x;
  }
  // Leaves in x what was stored.
  template <class Use>
  PYSMOOTH_HD void store(Vector* x, int64_t i) {
    constexpr Touch kUse = touch_of<Rule>(Use::kStreams);
    if constexpr ((kUse.writes & 1u) != 0) io::store(param + i, x->param);
    const vu32 random = noise(place, key);
    place += kNoiseStride * kFloats;
    for (int k = 0; k < Rule::kStates; ++k) {
      if (!has(kUse.writes, 2 + k)) continue;
      if (!has(kLow, k)) {
        io::store(static_cast<float*>(state[k]) + i, x->state[k]);
        continue;
      }
      const vu32 half = (random >> noise_shift(turn_of(kLow, k))) & 0xffffu;
      const vu32 rounded = round_bf16_stochastic<vu32>(x->state[k], half);
      io::store_upper(static_cast<bf16*>(state[k]) + i, rounded);
      x->state[k] = bits_as<vec<float>>(vu32(rounded & 0xffff0000u));
    }
  }
};

// Signs, a bit per element: set where the value is not at least 0. Reads n values up to a whole
// vector; bits beyond them are of no use.
template <class C>
PYSMOOTH_HD void store_signs(const C* values, int n, uint64_t* words) {
  for (int i = 0; i < n; i += lanes_of<C>) {
    const uint64_t bits = mask_bits(!(vector_io<C>::load(values + i) >= vec<C>{}));
    uint64_t& word = words[i / 64];
    word = (i % 64 == 0 ? 0u : word) | bits << i % 64;
  }
}

// `set` or `clear` for a vector of elements; `first` is a multiple of its length.
template <class C>
PYSMOOTH_HD vec<C> load_bits(const uint64_t* words, int64_t first, C set, C clear) {
  using U = std::conditional_t<sizeof(C) == 4, uint32_t, uint64_t>;
  vec<U> lane;
  for (int j = 0; j < lanes_of<C>; ++j) lane[j] = U{1} << j;
  const vec<U> bits = vec<U>{} + static_cast<U>(words[first / 64] >> first % 64);
  return (bits & lane) != 0u ? vec<C>{} + set : vec<C>{} + clear;
}

// Of the element `first` of the chunk and those after it.
template <class Use, class C, class Vector>
PYSMOOTH_HD void load_marks(const ApplyArgs& a, int64_t first, Vector* x) {
  for (int k = 0; k < kMaxSelections; ++k)
    if (has(Use::kStreams.marks, k) && a.bits[k] != nullptr)
      x->marked[k] = load_bits<C>(a.bits[k], first, C(1), C(0));
}

PYSMOOTH_KERNELS_END

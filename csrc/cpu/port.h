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

// 1 or -1 for a vector of elements; `first` is a multiple of its length.
template <class C>
PYSMOOTH_HD vec<C> load_signs(const uint64_t* words, int64_t first) {
  using U = std::conditional_t<sizeof(C) == 4, uint32_t, uint64_t>;
  vec<U> lane;
  for (int j = 0; j < lanes_of<C>; ++j) lane[j] = U{1} << j;
  const vec<U> bits = vec<U>{} + static_cast<U>(words[first / 64] >> first % 64);
  const vec<C> one = vec<C>{} + C(1);
  return (bits & lane) != 0u ? -one : one;
}

PYSMOOTH_KERNELS_END

// Compressors that look at one coordinate, given a number that was made of all of them: C(x).
//
//   identity        x
//   scaled_sign     scale, or -scale where x < 0; scale is the mean of |x|
//   hard_threshold  x where |x| >= level, else 0
//   qsgd            n step with x's sign, n drawn from the two integers next to |x| / step;
//                   step is the norm of all over the number of levels
//   natural         one of the two powers of two next to |x|, drawn, with x's sign
//   marks           scale x where the coordinate was selected, else 0
//
// What is drawn has the mean x: bits are cut off where a uniform number is at least what they are.
#pragma once

#include "core/rule.h"

namespace pysmooth {

enum class CompressorKind : int { identity, scaled_sign, hard_threshold, qsgd, natural, marks };

PYSMOOTH_HD constexpr CompressorKind compressor_kind(double kind) {
  return static_cast<CompressorKind>(static_cast<int>(kind));
}

PYSMOOTH_HD constexpr Sum compressor_sum(double kind) {
  const CompressorKind k = compressor_kind(kind);
  return k == CompressorKind::scaled_sign ? Sum::abs
         : k == CompressorKind::qsgd      ? Sum::squares
                                          : Sum::none;
}

// Of the four hyper-parameters that describe a compressor: kind, level, and the halves of a seed.
PYSMOOTH_HD constexpr Draw compressor_draw(const double* h) {
  const CompressorKind k = compressor_kind(h[0]);
  const bool draws = k == CompressorKind::qsgd || k == CompressorKind::natural;
  return draw_of(draws ? Draw::bits : Draw::none, h[2], h[3]);
}

}  // namespace pysmooth

PYSMOOTH_KERNELS_BEGIN

template <class V, class T>
PYSMOOTH_HD V scaled_sign(V x, T scale) {
  return ops<V>::select(x >= V{}, V{} + scale, V{} - scale);
}

template <class V, class T>
PYSMOOTH_HD V natural(V x, V drawn) {
  using O = ops<V>;
  using Word = typename O::Word;
  using Part = typename word_of<T>::type;
  constexpr int kDigits = word_of<T>::kDigits;
  constexpr Part kUnit = Part{1} << kDigits, kDigitMask = kUnit - 1u;
  constexpr Part kExponent = (~Part{0} >> 1) & ~kDigitMask;
  const Word bits = O::bits(x);
  const Word uniform = O::bits(drawn) >> (8 * static_cast<int>(sizeof(T)) - kDigits);
  const Word down = bits & ~kDigitMask;
  const Word up = down + kUnit;
  Word out = O::select(uniform < (bits & kDigitMask), up, down);
  out = O::select((out & kExponent) == kExponent, down, out);               // an overflow
  return O::number(O::select((bits & kExponent) == kExponent, bits, out));  // infinity, NaN
}

// How many steps.
template <class V, class T>
PYSMOOTH_HD V dithered_steps(V x, V drawn, T inverse, T levels) {
  using O = ops<V>;
  using Part = typename word_of<T>::type;
  constexpr int kDigits = word_of<T>::kDigits;
  constexpr Part kOne = ((Part{1} << (8 * sizeof(T) - 2 - kDigits)) - 1u) << kDigits;  // 1.0
  const V one = V{} + T(1), top = V{} + levels;
  V y = magnitude_of<V>(x) * inverse;
  y = O::select(y > top, top, y);
  const V low = O::floor(y);
  const typename O::Word digits =
      O::bits(drawn) >> (8 * static_cast<int>(sizeof(T)) - kDigits) | kOne;
  const V uniform = O::number(digits) - one;
  return O::select(uniform < y - low, low + one, low);
}

template <class V, class T>
PYSMOOTH_HD V dithered(V x, V drawn, T step, T inverse, T levels) {
  const V sent = dithered_steps<V, T>(x, drawn, inverse, levels) * step;
  return ops<V>::select(x < V{}, -sent, sent);
}

template <class T>
struct Compressor {
  CompressorKind kind;
  T level, scale, inverse;

  // h: kind and level; sum: what was taken over all coordinates, or the scale of marks.
  PYSMOOTH_HD Compressor(const double* h, double sum)
      : kind(compressor_kind(h[0])),
        level(static_cast<T>(h[1])),
        scale(static_cast<T>(sum)),
        inverse(0) {
    if (kind != CompressorKind::qsgd) return;
    // Where a step is too small for a normal number nothing is sent; none is infinite.
    constexpr double kTiny = sizeof(T) == 4 ? 1.1754943508222875e-38 : 2.2250738585072014e-308;
    constexpr double kMost = sizeof(T) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308;
    const double step = sum / h[1];
    scale = static_cast<T>(step < kTiny ? 0.0 : step > kMost ? kMost : step);
    inverse = static_cast<T>(step < kTiny ? 0.0 : 1.0 / (step > kMost ? kMost : step));
  }

  // aid: what was drawn for the coordinate; for marks, whether it was selected: 1 or 0.
  template <class V>
  PYSMOOTH_HD V operator()(V x, V aid) const {
    if (kind == CompressorKind::scaled_sign) return scaled_sign<V, T>(x, scale);
    if (kind == CompressorKind::hard_threshold)
      return ops<V>::select(magnitude_of<V>(x) >= V{} + level, x, V{});
    if (kind == CompressorKind::qsgd) return dithered<V, T>(x, aid, scale, inverse, level);
    if (kind == CompressorKind::natural) return natural<V, T>(x, aid);
    if (kind == CompressorKind::marks) return ops<V>::select(aid != V{}, x * scale, V{});
    return x;
  }
};

PYSMOOTH_KERNELS_END

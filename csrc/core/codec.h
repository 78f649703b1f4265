// Compressors that look at one coordinate, given a scale that was taken over all of them: C(x).
//
//   identity        x
//   scaled_sign     scale, or -scale where x < 0; scale is the mean of |x|
//   hard_threshold  x where |x| >= level, else 0
#pragma once

#include "core/rule.h"

namespace pysmooth {

enum class CodecKind : int { identity = 0, scaled_sign = 1, hard_threshold = 2 };

PYSMOOTH_HD constexpr Sum codec_sum(double kind) {
  return static_cast<CodecKind>(static_cast<int>(kind)) == CodecKind::scaled_sign ? Sum::abs
                                                                                  : Sum::none;
}

}  // namespace pysmooth

PYSMOOTH_KERNELS_BEGIN

template <class V, class T>
PYSMOOTH_HD V scaled_sign(V x, T scale) {
  return ops<V>::select(x >= V{}, V{} + scale, V{} - scale);
}

template <class T>
struct Codec {
  CodecKind kind;
  T level, scale;

  PYSMOOTH_HD Codec(double kind_, double level_, double scale_)
      : kind(static_cast<CodecKind>(static_cast<int>(kind_))),
        level(static_cast<T>(level_)),
        scale(static_cast<T>(scale_)) {}

  template <class V>
  PYSMOOTH_HD V operator()(V x) const {
    const V zero{};
    if (kind == CodecKind::scaled_sign) return scaled_sign<V, T>(x, scale);
    if (kind == CodecKind::hard_threshold) {
      const V magnitude = ops<V>::select(x < zero, -x, x);
      return ops<V>::select(magnitude >= zero + level, x, zero);
    }
    return x;
  }
};

PYSMOOTH_KERNELS_END

// Sums and maxima of a block of elements: what every reducing kernel folds its values with.
//
// Elements fold into 64 lanes, whatever the vector width: element i of a block goes to lane i
// mod 64. After every block of 8192 elements the lanes are combined in double, by a fixed tree. So
// SSE2, AVX2 and AVX-512, vector bodies and tails give the same bits, and a lane holds at most 128
// additions.
//
// Float sums can overflow (|x| > 1.8e19 in squares) or lose small terms to underflow. Both show in
// the block's sum, and such a block, still in L1, is summed again in double.
#pragma once

#include <cmath>

#include "cpu/kernels.h"
#include "cpu/vec.h"

PYSMOOTH_KERNELS_BEGIN

constexpr int kLanes = 64;
constexpr int kBlock = 8192;
constexpr double kLargestFinite = 1.7976931348623157e308;

// The unsigned integer with the bits of a floating-point type, alone or in vectors. Comparing
// magnitudes as integers orders NaN above infinity, so a maximum never loses one.
template <class C>
struct bits_of;
template <>
struct bits_of<float> {
  using type = uint32_t;
  static constexpr uint32_t kMagnitude = 0x7fffffffu;
  static constexpr uint32_t kInfinity = 0x7f800000u;
};
template <>
struct bits_of<double> {
  using type = uint64_t;
  static constexpr uint64_t kMagnitude = 0x7fffffffffffffffu;
  static constexpr uint64_t kInfinity = 0x7ff0000000000000u;
};

template <class C>
PYSMOOTH_HD vec<C> magnitude(vec<C> x) {
  using U = vec<typename bits_of<C>::type>;
  return bits_as<vec<C>>(U(bits_as<U>(x) & bits_of<C>::kMagnitude));
}

template <class C>
PYSMOOTH_HD vec<C> larger(vec<C> a, vec<C> b) {  // of two magnitudes
  using U = vec<typename bits_of<C>::type>;
  return bits_as<U>(b) > bits_as<U>(a) ? b : a;
}

struct Additive {
  static constexpr double kNeutral = 0.0;
  template <class V>
  PYSMOOTH_HD static V combine(V a, V b) {
    return a + b;
  }
};

template <class C>
struct Squares : Additive {
  PYSMOOTH_HD static vec<C> fold(vec<C> acc, vec<C> x) { return acc + x * x; }
};

template <class C>
struct Absolutes : Additive {
  PYSMOOTH_HD static vec<C> fold(vec<C> acc, vec<C> x) { return acc + magnitude<C>(x); }
};

template <class C>
struct Nonzeros : Additive {
  PYSMOOTH_HD static vec<C> fold(vec<C> acc, vec<C> x) {
    return acc + (x != vec<C>{} ? vec<C>{} + C(1) : vec<C>{});
  }
};

template <class C>
struct Largest {
  static constexpr double kNeutral = 0.0;
  PYSMOOTH_HD static vec<C> fold(vec<C> acc, vec<C> x) { return larger<C>(acc, magnitude<C>(x)); }
  template <class V>
  PYSMOOTH_HD static V combine(V a, V b) {
    return ((a > b) | (a != a)) ? a : b;
  }
};

template <class C>
struct Smallest {
  static constexpr double kNeutral = __builtin_inf();
  PYSMOOTH_HD static vec<C> fold(vec<C> acc, vec<C> x) {
    const vec<C> a = magnitude<C>(x);
    return ((a != a) | (a < acc)) ? a : acc;
  }
  template <class V>
  PYSMOOTH_HD static V combine(V a, V b) {
    return ((a < b) | (a != a)) ? a : b;
  }
};

// Combines the first N lanes, in double, by a fixed tree.
template <class F, int N, class C>
PYSMOOTH_HD double combine_lanes(const C* lanes) {
  constexpr int W = lanes_of<double>;
  constexpr int kRegisters = N / W;
  vec<double> x[kRegisters];
  for (int j = 0; j < kRegisters; ++j) x[j] = vector_io<double>::load(lanes + j * W);
#pragma GCC unroll 8
  for (int half = kRegisters / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int j = 0; j < half; ++j) x[j] = F::combine(x[j], x[j + half]);
  alignas(64) double last[W];
  vector_io<double>::store(last, x[0]);
  for (int half = W / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) last[j] = F::combine(last[j], last[j + half]);
  return last[0];
}

// Folds one block of n <= kBlock elements into 64 lanes and those into one double. A block that
// does not fill its last vector is completed with `pad`, which must not change the result.
template <class F, class C, class T>
PYSMOOTH_HD double fold_block(const T* x, int64_t n, C pad) {
  constexpr int W = lanes_of<C>;
  constexpr int kRegisters = kLanes / W;
  alignas(64) C lanes[kLanes];
  int64_t i = 0;
  {
    vec<C> acc[kRegisters];
    for (int j = 0; j < kRegisters; ++j) acc[j] = vec<C>{} + static_cast<C>(F::kNeutral);
    for (; i + kLanes <= n; i += kLanes) {
      for (int byte = 0; byte < kLanes * static_cast<int>(sizeof(T)); byte += 64)
        prefetch_ahead(reinterpret_cast<const char*>(x + i) + byte);
#pragma GCC unroll 16
      for (int j = 0; j < kRegisters; ++j)
        acc[j] = F::fold(acc[j], vector_io<C>::load(x + i + j * W));
    }
#pragma GCC unroll 16
    for (int j = 0; j < kRegisters; ++j) vector_io<C>::store(lanes + j * W, acc[j]);
  }
  const auto fold = [&lanes](int64_t at, vec<C> value) {
    vector_io<C>::store(lanes + at, F::fold(vector_io<C>::load(lanes + at), value));
  };
  int64_t lane = 0;
  for (; i + W <= n; i += W, lane += W) fold(lane, vector_io<C>::load(x + i));
  if (i < n) {
    alignas(64) C row[W];
    for (int j = 0; j < W; ++j) row[j] = i + j < n ? load1<C>(x + i + j) : pad;
    fold(lane, vector_io<C>::load(row));
  }
  // A small tensor (a bias, a norm's weight) leaves lanes neutral: combining those changes no bit.
  if (n <= 16) return combine_lanes<F, 16>(lanes);
  if (n <= 32) return combine_lanes<F, 32>(lanes);
  return combine_lanes<F, 64>(lanes);
}

template <class C, class T>
PYSMOOTH_HD double largest(const T* x, int64_t n) {
  return fold_block<Largest<C>>(x, n, C(0));
}

// A block's sum again, widened to double, for when the float sum cannot be trusted.
template <template <class> class F, class T>
double fold_wide(const T* x, int64_t n) {
  alignas(64) double row[kLanes];
  double total = 0.0;
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) row[j] = i + j < n ? load1<double>(x + i + j) : 0.0;
    total += fold_block<F<double>>(row, kLanes, 0.0);
  }
  return total;
}

template <class T>
bool any_nonfinite(const T* x, int64_t n) {
  const double a = largest<compute_t<T>>(x, n);
  return !(a <= kLargestFinite);
}

template <Reduction kind, class T>
PYSMOOTH_HD Partial reduce_block(const T* x, int64_t n, double power) {
  using C = compute_t<T>;
  Partial out;
  if constexpr (kind == Reduction::sum_squares || kind == Reduction::sum_abs) {
    constexpr bool kSquares = kind == Reduction::sum_squares;
    // Terms below this lose bits to underflow: 8192 of them, each off by 2^-150, stay invisible
    // beside a sum of 2^-100.
    constexpr double kTrusted = kSquares ? 7.8886090522101181e-31 : 0.0;
    const double sum =
        kSquares ? fold_block<Squares<C>>(x, n, C(0)) : fold_block<Absolutes<C>>(x, n, C(0));
    out.value = sum;
    if (!(sum >= kTrusted && sum <= 3.4028234663852886e38)) {
      const double top = largest<C>(x, n);
      out.nonfinite = !(top <= kLargestFinite);
      if (sizeof(C) == 4 && top != 0.0)
        out.value = kSquares ? fold_wide<Squares>(x, n) : fold_wide<Absolutes>(x, n);
    }
  } else if constexpr (kind == Reduction::max_abs) {
    out.value = largest<C>(x, n);
    out.nonfinite = !(out.value <= kLargestFinite);
  } else {
    if constexpr (kind == Reduction::min_abs) {
      out.value = fold_block<Smallest<C>>(x, n, static_cast<C>(__builtin_inf()));
    } else if constexpr (kind == Reduction::count_nonzero) {
      out.value = fold_block<Nonzeros<C>>(x, n, C(0));
    } else {
      for (int64_t i = 0; i < n; ++i) out.value += std::pow(std::fabs(load1<double>(x + i)), power);
    }
    out.nonfinite = any_nonfinite(x, n);
  }
  return out;
}

template <Reduction kind>
PYSMOOTH_HD void combine(Partial* total, const Partial& block) {
  if constexpr (kind == Reduction::max_abs)
    total->value = Largest<double>::combine(total->value, block.value);
  else if constexpr (kind == Reduction::min_abs)
    total->value = Smallest<double>::combine(total->value, block.value);
  else
    total->value += block.value;
  total->nonfinite = total->nonfinite || block.nonfinite;
}

PYSMOOTH_KERNELS_END

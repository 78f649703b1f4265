// The k largest of many by (magnitude, then lowest index first), digit by digit: 11 bits of the
// magnitude's key at a time, and then, only where equals are left to choose from, of the index.
#pragma once

#include "cuda/fold.cuh"

PYSMOOTH_KERNELS_BEGIN

using cuda::kDigitBits;
using cuda::kDigits;
using cuda::Threshold;

// Keys order as magnitudes do. Where doubles are among them all are widened.
template <class C>
PYSMOOTH_DEVICE uint64_t key_of(C x, bool wide) {
  if (sizeof(C) == 4 && !wide) return magnitude_bits(x);
  return magnitude_bits(static_cast<double>(x));
}

PYSMOOTH_DEVICE int key_bits(bool wide) { return wide ? 63 : 31; }

// Digit `number` of (key, place): the key's come first. A place is an index counted from the end,
// so that the larger of two is the one to take.
struct Digit {
  int shift, width;
  bool of_place;
  PYSMOOTH_DEVICE Digit(int number, bool wide, int place_bits) {
    const int digits = (key_bits(wide) + kDigitBits - 1) / kDigitBits;
    of_place = number >= digits;
    const int bits = of_place ? place_bits : key_bits(wide);
    const int above = (of_place ? number - digits : number) * kDigitBits;  // bits before this digit
    const int left = bits - above;
    width = left < kDigitBits ? left : kDigitBits;
    shift = left - width;
  }
  // -1 for what is not among those still in question.
  PYSMOOTH_DEVICE int of(const Threshold& t, uint64_t key, uint64_t place) const {
    if (of_place && key != t.key) return -1;
    const uint64_t x = of_place ? place : key, held = of_place ? t.place : t.key;
    if (x >> (shift + width) != held >> (shift + width)) return -1;
    return static_cast<int>(x >> shift & ((uint64_t{1} << width) - 1));
  }
};

PYSMOOTH_DEVICE int digits_of(bool wide, int place_bits) {
  return (key_bits(wide) + kDigitBits - 1) / kDigitBits +
         (place_bits + kDigitBits - 1) / kDigitBits;
}
PYSMOOTH_DEVICE int bits_for(int64_t elements) {
  int bits = 1;
  while (elements >> bits != 0) ++bits;
  return bits;
}

// Zeros are never taken.
PYSMOOTH_DEVICE bool takes(const Threshold& t, uint64_t key, uint64_t place) {
  return key > t.key || (key == t.key && key != 0 && (t.settled != 0 || place >= t.place));
}

using DigitSums = uint64_t[kThreads];

// Settles one digit of the threshold; at(i) is how many have digit i. One block.
template <class At>
PYSMOOTH_DEVICE void take_digit(Threshold* t, const Digit& digit, At at) {
  constexpr int kEach = kDigits / kThreads;
  PYSMOOTH_SHARED(DigitSums, sums);
  const int me = static_cast<int>(threadIdx.x);
  uint64_t sum = 0;
  for (int i = 0; i < kEach; ++i) sum += at(me * kEach + i);
  sums[me] = sum;
  __syncthreads();
  if (me == 0) {
    auto left = static_cast<uint64_t>(t->left);
    int group = kThreads - 1;
    while (group > 0 && sums[group] < left) left -= sums[group--];
    int i = group * kEach + kEach - 1;
    while (i > group * kEach && at(i) < left) left -= at(i--);
    (digit.of_place ? t->place : t->key) |= static_cast<uint64_t>(i) << digit.shift;
    t->left = static_cast<int64_t>(left);
    // All equals belong to the k: no need to tell them apart by place.
    if (!digit.of_place && digit.shift == 0 && at(i) == left) t->settled = 1;
  }
  __syncthreads();
}

using Histogram = uint32_t[kDigits];

// The threshold that lets k of n pass; body(i, see) hands the i-th one's key and place to see. One
// block, with a histogram of its own; `t` is shared.
template <class Each>
PYSMOOTH_DEVICE void find_threshold(Threshold* t, int64_t n, int64_t k, bool wide, int place_bits,
                                    uint32_t* histogram, Each each) {
  __syncthreads();
  if (threadIdx.x == 0) *t = {0, 0, k, 0};
  for (int number = 0; number < digits_of(wide, place_bits); ++number) {
    const Digit digit(number, wide, place_bits);
    for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kThreads) histogram[i] = 0;
    __syncthreads();
    if (t->settled != 0) break;
    for (int64_t i = threadIdx.x; i < n; i += kThreads)
      each(i, [&](uint64_t key, uint64_t place) {
        const int d = digit.of(*t, key, place);
        if (d >= 0) atomicAdd(&histogram[d], 1u);
      });
    __syncthreads();
    take_digit(t, digit, [&](int i) { return uint64_t{histogram[i]}; });
  }
  __syncthreads();
}

PYSMOOTH_KERNELS_END

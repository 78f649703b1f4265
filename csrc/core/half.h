// The 16-bit formats, converted on one element or a vector of them, with integers alone.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/config.h"

PYSMOOTH_KERNELS_BEGIN

template <class To, class From>
PYSMOOTH_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// U is uint32_t or a vector of them, F the float of that width. Rounding is to nearest even; a NaN
// stays a NaN, quiet, with the upper bits of its payload, as F16C does it.

template <class F, class U>
PYSMOOTH_HD F widen_bf16(U bits) {
  return bits_as<F>(U(bits << 16));
}

template <class U, class F>
PYSMOOTH_HD U narrow_bf16(F value) {
  const U x = bits_as<U>(value);
  const U rounded = (x + 0x7fffu + ((x >> 16) & 1u)) >> 16;
  const U quiet = (x >> 16) | 0x40u;
  return (x & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
}

// Rounded up with the probability of what is cut off; `random` is below 2^16. The result is in the
// upper half. Numbers that bfloat16 holds stay as they are, infinities and NaN as well: these come
// out of arithmetic, which leaves a NaN's upper bits set.
template <class U, class F>
PYSMOOTH_HD U round_bf16_stochastic(F value, U random) {
  const U x = bits_as<U>(value);
  return (x & 0x7f800000u) == 0x7f800000u ? x : U(x + random);
}

template <class F, class U>
PYSMOOTH_HD F widen_f16(U bits) {
  const U sign = (bits & 0x8000u) << 16;
  const U shifted = (bits & 0x7fffu) << 13;
  const U exponent = shifted & (0x7c00u << 13);
  const U normal = shifted + ((127u - 15u) << 23);
  const U special = normal + ((128u - 16u) << 23);
  const U quiet = (shifted & 0x7fffffu) != 0u ? U(special | 0x400000u) : special;
  // A subnormal half is its mantissa times 2^-24: build 2^-14 + that, take 2^-14 away, exactly.
  const U tiny_bits = normal + (1u << 23);
  const F tiny = bits_as<F>(tiny_bits) - bits_as<F>(U(U{} + (113u << 23)));
  const U magnitude = exponent == (0x7c00u << 13) ? quiet
                      : exponent == 0u            ? bits_as<U>(tiny)
                                                  : normal;
  return bits_as<F>(U(magnitude | sign));
}

template <class U, class F>
PYSMOOTH_HD U narrow_f16(F value) {
  const U x = bits_as<U>(value);
  const U sign = (x >> 16) & 0x8000u;
  const U a = x & 0x7fffffffu;
  // Adding this number pushes a half's subnormal mantissa into place, rounded by the addition.
  const U magic = U{} + (((127u - 15u) + (23u - 10u) + 1u) << 23);
  const U tiny = bits_as<U>(F(bits_as<F>(a) + bits_as<F>(magic))) - magic;
  const U normal = (a + ((15u - 127u) << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const U nan = 0x7e00u | ((a >> 13) & 0x3ffu);
  const U special = a > 0x7f800000u ? nan : U(U{} + 0x7c00u);
  const U magnitude = a >= ((127u + 16u) << 23) ? special : a < (113u << 23) ? tiny : normal;
  return magnitude | sign;
}

PYSMOOTH_KERNELS_END

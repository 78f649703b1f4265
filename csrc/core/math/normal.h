// Standard normal numbers from random words, by Box-Muller: two of them from two words.
//
//   u = (w0 / 2 + 1/2) 2^-31,  t = 2 pi w1 2^-32,  sqrt(-2 ln u) cos t  and  sqrt(-2 ln u) sin t
//
// In float, and by nothing but sums, products and a square root, so that every backend gets the
// same bits; within 2e-7 of sqrt(-2 ln u). None is larger than 6.7. The polynomials are fits to
// what the comments say.
#pragma once

#include "core/rule.h"

PYSMOOTH_KERNELS_BEGIN

// By Horner's rule; the constant comes first.
template <class V>
PYSMOOTH_HD V polynomial(V, float last) {
  return V{} + last;
}
template <class V, class... Rest>
PYSMOOTH_HD V polynomial(V x, float first, Rest... rest) {
  return polynomial<V>(x, rest...) * x + first;
}

// V is float or a vector of them, Word the unsigned integers of that width.
template <class V, class Word = typename ops<V>::Word>
PYSMOOTH_HD void box_muller(Word first, Word second, V* across, V* along) {
  using O = ops<V>;
  // u = 2^e (1 + f), f within sqrt(1/2) - 1 and sqrt(2) - 1
  const V u = (O::whole(first >> 1) + 0.5f) * 4.656612873077393e-10f;
  const Word e = ((O::bits(u) - 0x3F3504F3u + 0x40000000u) >> 23) - 128u;
  const V f = O::number(O::bits(u) - (e << 23)) - 1.0f;
  const V square = f * f;
  // -2 ln(1 + f) = f^2 - 2 f + f^3 (...)
  const V cubic = f * polynomial<V>(f, -0.6666663f, 0.5000162f, -0.40004572f, 0.33249104f,
                                    -0.28362402f, 0.2625757f, -0.25763178f, 0.15718919f);
  const V radius = O::sqrt(square * cubic + square - f * 2.0f - O::whole(e) * 1.3862944f);
  // Quarter turns, and what is left of the angle, within -pi/4 and pi/4.
  const Word turns = (second + 0x20000000u) >> 30;
  const V y = O::whole(second - (turns << 30)) * 1.4629181e-09f;
  const V z = y * y;
  // sin(y) = y + y^3 (...), cos(y) = 1 - y^2 / 2 + y^4 (...)
  const V sine = y * z * polynomial<V>(z, -0.16666655f, 0.008332178f, -0.00019517296f) + y;
  const V cosine =
      z * z * polynomial<V>(z, 0.041666646f, -0.0013887368f, 2.4438448e-05f) - z * 0.5f + 1.0f;
  const auto odd = (turns & 1u) != 0u;
  const Word left = ((turns + 1u) & 2u) << 30, up = (turns & 2u) << 30;  // signs
  *across = O::number(O::bits(O::select(odd, sine, cosine)) ^ left) * radius;
  *along = O::number(O::bits(O::select(odd, cosine, sine)) ^ up) * radius;
}

PYSMOOTH_KERNELS_END

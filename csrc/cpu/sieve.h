// Keeps the large ones of a stream of values, and where they are. Nobody can predict which they
// are, so vectors are compressed in registers and stored whole, without a branch: what was not
// counted is written over by the next.
#pragma once

#include "cpu/fold.h"
#include "cpu/vec.h"

PYSMOOTH_KERNELS_BEGIN

// A bound as the values' type has it, never 0: zeros do not reach it. Rounded up: values of that
// type reach both or none.
template <class C>
PYSMOOTH_HD C least_of(double bound) {
  using U = typename bits_of<C>::type;
  C least = static_cast<C>(bound);
  if (static_cast<double>(least) < bound || least == C(0))
    least = bits_as<C>(U(bits_as<U>(least) + 1u));
  return least;
}

// A bit per lane: set where the magnitude is at least `least`.
template <class C>
PYSMOOTH_HD unsigned reach_bits(vec<C> x, vec<C> least) {
  const vec<C> size = magnitude<C>(x);
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4)
    return _mm512_cmp_ps_mask(bits_as<__m512>(size), bits_as<__m512>(least), _CMP_GE_OQ);
  else
    return _mm512_cmp_pd_mask(bits_as<__m512d>(size), bits_as<__m512d>(least), _CMP_GE_OQ);
#else
  return mask_bits(size >= least);
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// For every set of 8 lanes its members, in order, a byte each.
struct LanesTable {
  uint64_t lanes[256];
  constexpr LanesTable() : lanes() {
    for (unsigned set = 0; set < 256; ++set) {
      int at = 0;
      for (unsigned lane = 0; lane < 8; ++lane)
        if ((set >> lane & 1u) != 0) lanes[set] |= uint64_t{lane} << 8 * at++;
    }
  }
};
#endif

// Where the lanes of a vector of values are.
template <class C>
using Places = typename vector_of<uint32_t, lanes_of<C> * 4>::type;

template <class C>
PYSMOOTH_HD Places<C> places_from(uint32_t first) {
  Places<C> out;
  for (uint32_t j = 0; j < static_cast<uint32_t>(lanes_of<C>); ++j) out[j] = first + j;
  return out;
}

template <class C>
struct Sieve {
  C* values;
  uint32_t* index;
  int64_t count = 0;

  // Takes in the lanes whose bits are set.
  PYSMOOTH_HD void take(vec<C> x, Places<C> place, unsigned bits) {
    C* const v = values + count;
    uint32_t* const at = index + count;
#if defined(__AVX512F__)
    if constexpr (sizeof(C) == 4) {
      const auto mask = static_cast<__mmask16>(bits);
      _mm512_storeu_ps(v, _mm512_maskz_compress_ps(mask, bits_as<__m512>(x)));
      _mm512_storeu_si512(at, _mm512_maskz_compress_epi32(mask, bits_as<__m512i>(place)));
    } else {
      const auto mask = static_cast<__mmask8>(bits);
      _mm512_storeu_pd(v, _mm512_maskz_compress_pd(mask, bits_as<__m512d>(x)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(at),
                          _mm256_maskz_compress_epi32(mask, bits_as<__m256i>(place)));
    }
    count += __builtin_popcount(bits);
    return;
#elif defined(__AVX2__)
    if constexpr (sizeof(C) == 4) {
      static constexpr LanesTable kTable;
      const __m256i lanes =
          _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(kTable.lanes[bits])));
      _mm256_storeu_ps(v, _mm256_permutevar8x32_ps(bits_as<__m256>(x), lanes));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(at),
                          _mm256_permutevar8x32_epi32(bits_as<__m256i>(place), lanes));
      count += __builtin_popcount(bits);
      return;
    }
#endif
    // Few lanes: mostly there is none to take.
    for (int64_t n = 0; bits != 0; bits &= bits - 1u, ++n, ++count) {
      const int lane = __builtin_ctz(bits);
      v[n] = x[lane];
      at[n] = place[lane];
    }
  }
};

// Keeps those of n picks that reach the bound, in place; returns how many they are.
template <class C>
PYSMOOTH_HD int64_t sift(C* values, uint32_t* index, int64_t n, C bound) {
  constexpr int W = lanes_of<C>;
  const vec<C> least = vec<C>{} + bound;
  Sieve<C> sieve{values, index};
  for (int64_t i = 0; i < n; i += W) {
    const vec<C> x = vector_io<C>::load(values + i);
    Places<C> place;
    std::memcpy(&place, index + i, sizeof(place));
    unsigned bits = reach_bits<C>(x, least);
    if (n - i < W) bits &= (1u << (n - i)) - 1u;
    sieve.take(x, place, bits);
  }
  return sieve.count;
}

PYSMOOTH_KERNELS_END

// SIMD vectors of the ISA level being compiled, with loads and stores for every storage type.
//
// Built on the compilers' generic vectors, so that a rule's arithmetic reads the same on a float
// and on 4, 8 or 16 of them. Intrinsics appear only where F16C has an instruction for a conversion.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/dtype.h"
#include "core/half.h"
#include "core/rule.h"

PYSMOOTH_KERNELS_BEGIN

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int kBytes = kVectorBytes>
struct vector_of {
  typedef T type __attribute__((vector_size(kBytes)));
  // The same vector at an address with no alignment promise.
  typedef T unaligned __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
};
template <class T>
using vec = typename vector_of<T>::type;

constexpr int kFloats = kVectorBytes / 4;
constexpr int kDoubles = kVectorBytes / 8;
template <class T>
constexpr int lanes_of = kVectorBytes / static_cast<int>(sizeof(T));

using vu32 = vec<uint32_t>;
typedef uint16_t vu16 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t vu16_unaligned
    __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef float vhalf_unaligned __attribute__((vector_size(kVectorBytes / 2), aligned(4), may_alias));

// Correctly rounded, as IEEE has it; compilers make one instruction of it.
template <class V, class C>
PYSMOOTH_HD V sqrt_each(V x) {
  V out{};
#pragma GCC unroll 16
  for (int i = 0; i < lanes_of<C>; ++i) out[i] = std::sqrt(x[i]);
  return out;
}

template <class V, class C>
PYSMOOTH_HD V floor_each(V x) {
  V out{};
#pragma GCC unroll 16
  for (int i = 0; i < lanes_of<C>; ++i) out[i] = std::floor(x[i]);
  return out;
}

template <class C>
struct vector_ops {
  using V = vec<C>;
  using Word = vec<typename word_of<C>::type>;
  template <class Mask, class T>
  PYSMOOTH_HD static T select(Mask mask, T yes, T no) {
    return mask ? yes : no;
  }
  PYSMOOTH_HD static V sqrt(V x) { return sqrt_each<V, C>(x); }
  PYSMOOTH_HD static V floor(V x) { return floor_each<V, C>(x); }
  PYSMOOTH_HD static Word bits(V x) { return bits_as<Word>(x); }
  PYSMOOTH_HD static V number(Word bits) { return bits_as<V>(bits); }
  PYSMOOTH_HD static V whole(Word x) {
    using Signed = vec<std::make_signed_t<typename word_of<C>::type>>;
    return __builtin_convertvector(bits_as<Signed>(x), V);
  }
};
template <>
struct ops<vec<float>> : vector_ops<float> {};
template <>
struct ops<vec<double>> : vector_ops<double> {};

// One bit per lane of a comparison's result.
template <class Mask>
PYSMOOTH_HD unsigned mask_bits(Mask mask) {
  constexpr int kLaneCount = static_cast<int>(sizeof(Mask) / sizeof(mask[0]));
#if defined(__AVX512F__)
  if constexpr (kLaneCount == 16)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
  else
    return _mm512_movepi64_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  if constexpr (kLaneCount == 8)
    return static_cast<unsigned>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
  else
    return static_cast<unsigned>(_mm256_movemask_pd(reinterpret_cast<__m256d>(mask)));
#elif defined(__SSE2__)
  if constexpr (kLaneCount == 4)
    return static_cast<unsigned>(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
  else
    return static_cast<unsigned>(_mm_movemask_pd(reinterpret_cast<__m128d>(mask)));
#else
  unsigned bits = 0;
  for (int i = 0; i < kLaneCount; ++i) bits |= (mask[i] != 0 ? 1u : 0u) << i;
  return bits;
#endif
}

// ---- one element
// ---------------------------------------------------------------------------------

template <class C>
PYSMOOTH_HD C load1(const float* p) {
  return static_cast<C>(*p);
}
template <class C>
PYSMOOTH_HD C load1(const double* p) {
  return static_cast<C>(*p);
}
template <class C>
PYSMOOTH_HD C load1(const bf16* p) {
  return static_cast<C>(widen_bf16<float, uint32_t>(p->bits));
}
template <class C>
PYSMOOTH_HD C load1(const f16* p) {
  return static_cast<C>(widen_f16<float, uint32_t>(p->bits));
}
PYSMOOTH_HD void store1(float* p, float x) { *p = x; }
PYSMOOTH_HD void store1(double* p, double x) { *p = x; }
PYSMOOTH_HD void store1(bf16* p, float x) {
  p->bits = static_cast<uint16_t>(narrow_bf16<uint32_t>(x));
}
PYSMOOTH_HD void store1(f16* p, float x) {
  p->bits = static_cast<uint16_t>(narrow_f16<uint32_t>(x));
}

// ---- vectors: lanes_of<C> elements, computed in C
// ------------------------------------------------

template <class C>
struct vector_io;

template <>
struct vector_io<float> {
  using V = vec<float>;
  PYSMOOTH_HD static V load(const float* p) {
    return *reinterpret_cast<const vector_of<float>::unaligned*>(p);
  }
  PYSMOOTH_HD static void store(float* p, V x) {
    *reinterpret_cast<vector_of<float>::unaligned*>(p) = x;
  }
  PYSMOOTH_HD static vu16 load16(const void* p) {
    return *reinterpret_cast<const vu16_unaligned*>(p);
  }
  PYSMOOTH_HD static vu32 widened16(const void* p) {
#if defined(__AVX512F__)
    return bits_as<vu32>(_mm512_maskz_cvtepu16_epi32(0xffff, bits_as<__m256i>(load16(p))));
#else
    return __builtin_convertvector(load16(p), vu32);
#endif
  }
  PYSMOOTH_HD static void store16(void* p, vu32 x) {
    *reinterpret_cast<vu16_unaligned*>(p) = __builtin_convertvector(x, vu16);
  }
  PYSMOOTH_HD static V load(const bf16* p) { return widen_bf16<V>(widened16(p)); }
  // The upper halves of the words. Written out where compilers would take a detour.
  PYSMOOTH_HD static void store_upper(bf16* p, vu32 x) {
#if defined(__AVX512F__)
    typedef uint16_t halves __attribute__((vector_size(64)));
    const halves both = bits_as<halves>(x);
    *reinterpret_cast<vu16_unaligned*>(p) = __builtin_shufflevector(
        both, both, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
    store16(p, x >> 16);
#endif
  }
  PYSMOOTH_HD static void store(bf16* p, V x) { store16(p, narrow_bf16<vu32>(x)); }
#if defined(__AVX512F__)
  // The masked forms with every lane on: gcc 12 warns about the plain ones' own header (PR 105593).
  static constexpr __mmask16 kAll = 0xffff;
  PYSMOOTH_HD static V load(const f16* p) {
    return bits_as<V>(_mm512_maskz_cvtph_ps(kAll, bits_as<__m256i>(load16(p))));
  }
  PYSMOOTH_HD static void store(f16* p, V x) {
    const __m256i bits = _mm512_maskz_cvtps_ph(kAll, bits_as<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
    *reinterpret_cast<vu16_unaligned*>(p) = bits_as<vu16>(bits);
  }
#elif defined(__F16C__)
  PYSMOOTH_HD static V load(const f16* p) {
    return bits_as<V>(_mm256_cvtph_ps(bits_as<__m128i>(load16(p))));
  }
  PYSMOOTH_HD static void store(f16* p, V x) {
    const __m128i bits = _mm256_cvtps_ph(bits_as<__m256>(x), _MM_FROUND_TO_NEAREST_INT);
    *reinterpret_cast<vu16_unaligned*>(p) = bits_as<vu16>(bits);
  }
#else
  PYSMOOTH_HD static V load(const f16* p) {
    return widen_f16<V>(__builtin_convertvector(load16(p), vu32));
  }
  PYSMOOTH_HD static void store(f16* p, V x) { store16(p, narrow_f16<vu32>(x)); }
#endif
};

template <>
struct vector_io<double> {
  using V = vec<double>;
  PYSMOOTH_HD static V load(const double* p) {
    return *reinterpret_cast<const vector_of<double>::unaligned*>(p);
  }
  PYSMOOTH_HD static V load(const float* p) {
    return __builtin_convertvector(*reinterpret_cast<const vhalf_unaligned*>(p), V);
  }
  PYSMOOTH_HD static void store(double* p, V x) {
    *reinterpret_cast<vector_of<double>::unaligned*>(p) = x;
  }
};

// The first n < lanes_of<C> elements of a vector, in memory; the other lanes load as 0. Written out
// where there is an instruction: a loop's narrow stores would hold up the wide load that follows.
#if defined(__AVX512F__)
PYSMOOTH_HD vec<float> load_some(const float* p, int n) {
  return bits_as<vec<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p));
}
PYSMOOTH_HD vec<double> load_some(const double* p, int n) {
  return bits_as<vec<double>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1u), p));
}
PYSMOOTH_HD void store_some(float* p, vec<float> x, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), bits_as<__m512>(x));
}
PYSMOOTH_HD void store_some(double* p, vec<double> x, int n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1u), bits_as<__m512d>(x));
}
#elif defined(__AVX2__)
template <class I>
PYSMOOTH_HD __m256i first_lanes(int n) {
  alignas(64) static constexpr I kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask + 8 - n));
}
PYSMOOTH_HD vec<float> load_some(const float* p, int n) {
  return bits_as<vec<float>>(_mm256_maskload_ps(p, first_lanes<int32_t>(n)));
}
PYSMOOTH_HD vec<double> load_some(const double* p, int n) {
  return bits_as<vec<double>>(_mm256_maskload_pd(p, first_lanes<int64_t>(n)));
}
PYSMOOTH_HD void store_some(float* p, vec<float> x, int n) {
  _mm256_maskstore_ps(p, first_lanes<int32_t>(n), bits_as<__m256>(x));
}
PYSMOOTH_HD void store_some(double* p, vec<double> x, int n) {
  _mm256_maskstore_pd(p, first_lanes<int64_t>(n), bits_as<__m256d>(x));
}
#else
template <class C>
PYSMOOTH_HD vec<C> load_some(const C* p, int n) {
  vec<C> x{};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return x;
}
template <class C>
PYSMOOTH_HD void store_some(C* p, vec<C> x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x[i];
}
#endif

// A stream that hardware prefetchers run a page behind on: touch 1 KB ahead into L2.
PYSMOOTH_HD void prefetch_ahead(const void* p) {
  // As an integer: the address may lie past the end, where a pointer must not point.
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + 1024), 0, 2);
}

PYSMOOTH_KERNELS_END

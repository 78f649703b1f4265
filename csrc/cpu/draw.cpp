#include "cpu/draw.h"

#include "core/math/normal.h"

PYSMOOTH_KERNELS_BEGIN

// Products of even and of odd lanes, put together again.
struct MultiplyLanes {
  PYSMOOTH_HD vu32 operator()(vu32 a, uint32_t b, vu32* upper) const {
    using Wide = vec<uint64_t>;
    constexpr uint64_t kLower = 0xffffffffu;
    const Wide pairs = bits_as<Wide>(a);
    const Wide even = product(pairs, b), odd = product(pairs >> 32, b);
    *upper = bits_as<vu32>(Wide((even >> 32) | (odd & ~kLower)));
    return bits_as<vu32>(Wide((even & kLower) | (odd << 32)));
  }

 private:
  // Of the lower halves: written out, because compilers would multiply 64 bits by 64.
  PYSMOOTH_HD static vec<uint64_t> product(vec<uint64_t> a, uint32_t b) {
#if defined(__AVX512F__)
    // The masked form with every lane on: gcc 12 warns about the plain one's own header (PR
    // 105593).
    return bits_as<vec<uint64_t>>(
        _mm512_maskz_mul_epu32(0xff, bits_as<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
    return bits_as<vec<uint64_t>>(_mm256_mul_epu32(bits_as<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
    return bits_as<vec<uint64_t>>(_mm_mul_epu32(bits_as<__m128i>(a), _mm_set1_epi64x(b)));
#else
    return (a & uint64_t{0xffffffffu}) * uint64_t{b};
#endif
  }
};

template <int...>
struct Lanes {};
template <int kCount, int... kLane>
struct Count : Count<kCount - 1, kCount - 1, kLane...> {};
template <int... kLane>
struct Count<0, kLane...> {
  using type = Lanes<kLane...>;
};
using AllLanes = Count<kFloats>::type;

// a0 b0 a1 b1 ...: `half` 0 takes the first lanes of both, 1 the last ones.
template <int kHalf, int... kLane>
PYSMOOTH_HD vu32 interleaved(vu32 a, vu32 b, Lanes<kLane...>) {
  constexpr int W = kFloats;
  return __builtin_shufflevector(a, b, (kHalf * W / 2 + kLane / 2 + kLane % 2 * W)...);
}

// Lane i of word j is for element 4 i + j: in the order of elements that is four vectors.
PYSMOOTH_HD WordsOf<vu32> in_order(const WordsOf<vu32>& x) {
  const AllLanes lanes;
  const vu32 even_low = interleaved<0>(x.word[0], x.word[2], lanes);
  const vu32 even_high = interleaved<1>(x.word[0], x.word[2], lanes);
  const vu32 odd_low = interleaved<0>(x.word[1], x.word[3], lanes);
  const vu32 odd_high = interleaved<1>(x.word[1], x.word[3], lanes);
  return {{interleaved<0>(even_low, odd_low, lanes), interleaved<1>(even_low, odd_low, lanes),
           interleaved<0>(even_high, odd_high, lanes), interleaved<1>(even_high, odd_high, lanes)}};
}

// The words of `kFloats` blocks of four elements.
PYSMOOTH_HD WordsOf<vu32> words_of(uint64_t block, const ApplyArgs& a, uint64_t seed,
                                   uint32_t second) {
  vu32 low;
  for (uint32_t j = 0; j < static_cast<uint32_t>(kFloats); ++j)
    low[j] = static_cast<uint32_t>(block) + j;
  const vu32 carried = low < static_cast<uint32_t>(block) ? vu32{} + 1u : vu32{};
  const vu32 high = carried + static_cast<uint32_t>(block >> 32);
  return philox<vu32, MultiplyLanes>({{low, high, vu32{} + a.step, vu32{} + (a.tensor | second)}},
                                     static_cast<uint32_t>(seed),
                                     static_cast<uint32_t>(seed >> 32));
}

template <class C, bool kDraws>
void Drawing<C, kDraws>::fill(int64_t first, int64_t count) {
  const int64_t skipped = first % 4;
  for (int64_t i = 0; i < skipped + count; i += 4 * kFloats) {
    const auto block = static_cast<uint64_t>((first - skipped + i) / 4);
    const auto draw = [&](uint32_t second) { return words_of(block, args_, draw_.seed, second); };
    WordsOf<vu32> x = draw(0);
    if (draw_.kind == Draw::normal) {
      vec<float> across, along;
      for (int j = 0; j < 4; j += 2) {
        box_muller<vec<float>>(x.word[j], x.word[j + 1], &across, &along);
        x.word[j] = bits_as<vu32>(across);
        x.word[j + 1] = bits_as<vu32>(along);
      }
    }
    x = in_order(x);
    if constexpr (sizeof(C) == 4) {
      for (int j = 0; j < 4; ++j)
        vector_io<float>::store(room_ + i + j * kFloats, bits_as<vec<float>>(x.word[j]));
    } else if (draw_.kind == Draw::normal) {
      for (int j = 0; j < 4; ++j) {
        const vec<float> z = bits_as<vec<float>>(x.word[j]);
        for (int k = 0; k < kFloats; ++k) room_[i + j * kFloats + k] = static_cast<double>(z[k]);
      }
    } else {
      const WordsOf<vu32> y = in_order(draw(kSecondWord));
      for (int j = 0; j < 4; ++j)
        for (int k = 0; k < kFloats; ++k)
          room_[i + j * kFloats + k] =
              ops<double>::number(uint64_t{x.word[j][k]} << 32 | y.word[j][k]);
    }
  }
}

template class Drawing<float, true>;
template class Drawing<double, true>;

PYSMOOTH_KERNELS_END

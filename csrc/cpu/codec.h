// codec: what leaves the process. Messages about one flat float tensor: a bit per sign, the k
// largest and where they are, or all of them, rounded at random. Every rank decodes everybody's, in
// the order of ranks, to the same bits.
//
// A sign is set where x >= 0; the first element is the lowest bit of the first byte.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace pysmooth {

constexpr int64_t kCodecChunk = int64_t{1} << 15;
constexpr int64_t kCandidateRoom = kCodecChunk + 64;

// Which random numbers: see core/random.h.
struct Drawn {
  uint64_t seed;
  uint32_t step, tensor;
};

// Runs over chunks, on so many threads.
double code(const CodedSource& source, int64_t n, float* out, uint8_t* bits, int threads);
void subtract_signs(float* x, int64_t n, float scale, int threads);
void sum_signs(const SignMessages& messages, int64_t n, float factor, float* out, uint8_t* signs,
               int threads);

// The k largest of x by magnitude, of equals the first ones, in the order of the tensor; `out`, if
// given, is x without them; returns the sum of |x|. Where fewer are not 0, the first zeros make up
// for them: a message has one size.
double code_top_k(const CodedSource& source, int64_t n, int64_t k, float* out, int64_t* index,
                  float* values, int threads);

// Puts factor * the sum over ranks of such messages, plus `base` if given, into `out`: places
// (packed indices in their order, or a bit per element), then values.
void sum_top_k(const uint8_t* first, int64_t stride, int ranks, int64_t n, int64_t k, float factor,
               const float* base, float* out, int threads);

// Each number as one of the two powers of two next to it, drawn: exponents, then signs.
void code_natural(const CodedSource& source, int64_t n, const Drawn& drawn, float* out,
                  uint8_t* message, int threads);
// As one of the two multiples of a unit next to it, drawn; a unit per block, ||x|| / levels: units,
// then numbers of 1 + bits of `levels` bits, whose lowest bit is the sign.
void code_levels(const CodedSource& source, int64_t n, const Drawn& drawn, int levels,
                 int64_t block, float* out, uint8_t* message, int threads);
void sum_natural(const uint8_t* first, int64_t stride, int ranks, int64_t n, float* out,
                 int threads);
void sum_levels(const uint8_t* first, int64_t stride, int ranks, int64_t n, int levels,
                int64_t block, float* out, int threads);

// Numbers of `width` bits, one after another, the lowest bit first.
void pack_bits(const int64_t* numbers, int64_t n, int width, uint8_t* out);
void unpack_bits(const uint8_t* packed, int64_t n, int width, int64_t* numbers);

}  // namespace pysmooth

// codec: what leaves the process. Messages about one flat float tensor: a bit per sign, or the k
// largest and where they are. Every rank decodes everybody's, in the order of ranks, to the same
// bits.
//
// A sign is set where x >= 0; the first element is the lowest bit of the first byte.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace pysmooth {

constexpr int64_t kCodecChunk = int64_t{1} << 15;
constexpr int64_t kCandidateRoom = kCodecChunk + 64;

// Runs over chunks, on so many threads.
double code(const CodedSource& source, int64_t n, float* out, uint8_t* bits, int threads);
void subtract_signs(float* x, int64_t n, float scale, int threads);
void sum_signs(const SignMessages& messages, int64_t n, float factor, float* out, uint8_t* signs,
               int threads);

// The k largest of x by magnitude, of equals the first ones, in the order of the tensor; `out` is
// x without them. Where fewer are not 0, the first zeros make up for them: a message has one size.
void code_top_k(const CodedSource& source, int64_t n, int64_t k, float* out, int64_t* index,
                float* values, int threads);

// Numbers of `width` bits, one after another, the lowest bit first.
void pack_bits(const int64_t* numbers, int64_t n, int width, uint8_t* out);
void unpack_bits(const uint8_t* packed, int64_t n, int width, int64_t* numbers);

}  // namespace pysmooth

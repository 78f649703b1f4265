// codec: what leaves the process. Messages about one flat float tensor: a bit per sign, or the k
// largest and where they are. Every rank decodes everybody's, in the order of ranks, to the same
// bits.
//
// A sign is set where x >= 0; the first element is the lowest bit of the first byte.
#pragma once

#include <cstdint>

namespace pysmooth {

// What is coded: x = b * e + a * g; b is 1 or -1.
struct CodedSource {
  const float *g, *e;  // e: null for none
  float a, b;
};

constexpr int64_t kCodecChunk = int64_t{1} << 15;

// Room for more than a chunk's elements, since whole vectors are stored.
struct Candidates {
  float* values;
  uint32_t* index;  // of the tensor
  int64_t count;
};
constexpr int64_t kCandidateRoom = kCodecChunk + 64;

struct CodedChunk {
  CodedSource source;
  int64_t begin, length;  // begin: a multiple of 64
  float* out;             // x, from the tensor's first element; null: not kept
  uint8_t* bits;          // likewise, signs
  double filter;          // least magnitude of a candidate
  Candidates* found;      // null: none are wanted
};

struct SignMessages {
  const uint8_t* const* bits;
  const float* scales;  // null: 1
  int ranks;
};

struct CodecTable {
  double (*code)(const CodedChunk&);  // the sum of |x|
  // x -= scale * sign(x)
  void (*subtract)(float* x, int64_t n, float scale);
  // out = factor * (the sum of scale * sign over ranks); or its sign, where out is null
  void (*sum)(const SignMessages&, int64_t begin, int64_t length, float factor, float* out,
              uint8_t* signs);
};

namespace baseline {
CodecTable codec_table();
}
namespace avx2 {
CodecTable codec_table();
}
namespace avx512 {
CodecTable codec_table();
}

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

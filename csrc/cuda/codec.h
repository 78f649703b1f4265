// codec, on CUDA: what kernels of messages are told, and what the host calls. Twin of cpu/codec.h.
//
// Nothing here waits for the device, and nothing allocates. A function returns 0, or a CUDA error
// code for error_name() (launch.h). Addresses are device memory; those of messages need no
// alignment. Bytes and bits are the CPU kernels'.
#pragma once

#include <cstdint>

#include "cuda/plan.h"

namespace pysmooth::cuda {

// b * e + a * g; without e, a * g.
struct CodedSource {
  const float *g, *e;
  float a, b;
};

// What the search for the k largest keeps; all bytes 0 before.
struct SearchState {
  Threshold threshold;
  unsigned long long spoiled;  // numbers that are not finite
  unsigned long long digits[kDigits];
  uint32_t arrived;
};

// Everything that a kernel may need; each has its part of it.
struct Coding {
  CodedSource source;
  int64_t n;                // elements
  float* out;               // x, or what is left of it; or a sum over ranks. Null: not wanted
  uint8_t* message;         // what is written
  const uint8_t* messages;  // what ranks have sent, `stride` bytes apart
  int64_t stride;
  int32_t ranks;
  const float* scales;  // of signs: one per rank; null: 1
  float factor;         // what is sent, or a sum, is multiplied by
  const float* base;    // what is added to a sum; null: nothing
  double* sums;         // what blocks leave
  uint64_t seed;        // of what is drawn: core/random.h
  uint32_t step, tensor;
  int32_t levels;  // of QSGD, and elements of a block
  int64_t block;
  float* units;          // per block: what it is multiplied by; then what it is divided by
  int64_t k, room;       // values of a message, and bytes of their places
  int32_t width, digit;  // bits of a place; which digit is looked for
  int64_t* index;        // places, before they are packed; null: a bit per element
  int64_t* counts;       // chosen ones per 256 elements; emit and spread: up to their end
  SearchState* state;
};

using CodecKernel = void (*)(Coding);
enum Codec : int {
  kCodeSigns,
  kAddUp,
  kSubtractSigns,
  kSumSigns,
  kVote,
  kCodeNatural,
  kSumNatural,
  kSumSquares,
  kAddUnits,
  kCodeLevels,
  kSumLevels,
  kWeigh,
  kNarrowDown,
  kCountChosen,
  kEmit,
  kPackNumbers,
  kScatter,
  kCountMarks,
  kSpread,
  kCombine,
  kPickDrawn,
  kDropDrawn,
  kCodecKernels
};

// Elements that a thread takes, where it has whole bytes of bits to itself.
constexpr int kOctet = 8;

// x into `out`, a bit per element where x >= 0 into `message`, and the sum of |x| into the last of
// sums_of(n) numbers at `sums`.
int code_signs(const Coding& c, void* stream);
int64_t sums_of(int64_t n);
// out -= scale * sign(out); the scale is at `scales`.
int subtract_signs(const Coding& c, void* stream);
// out = factor * the sum over ranks, in their order, of scale * sign.
int sum_signs(const Coding& c, void* stream);
// A bit into `message` where the sum of signs is not negative.
int vote(const Coding& c, void* stream);

// What is sent into `message`, what is left of x into `out`; and base + factor * the sum over
// ranks.
int code_natural(const Coding& c, void* stream);
int sum_natural(const Coding& c, void* stream);
int code_levels(const Coding& c, void* stream);
int sum_levels(const Coding& c, void* stream);
int64_t squares_of(int64_t n, int64_t block);  // of how many numbers `sums` consists there

// The k largest, first half: x into `out`, how many are chosen into two rows of tiles_of(n) at
// `counts`. Second half, with these added up: values, and places as bits or, for pack, at `index`.
int weigh(const Coding& c, void* stream);
int emit(const Coding& c, void* stream);
int64_t tiles_of(int64_t n);
int pack(const Coding& c, void* stream);  // k numbers at `index`, of `width` bits
// One rank's values are added to `out`, which begins with zeros.
int scatter(const Coding& c, void* stream);
// Of bits: how many into a row per rank of tiles_of(n) at `counts`; then, with these added up,
// sums.
int count_marks(const Coding& c, void* stream);
int spread(const Coding& c, void* stream);

int code_drawn(const Coding& c, void* stream);
int add_drawn(const Coding& c, void* stream);

}  // namespace pysmooth::cuda

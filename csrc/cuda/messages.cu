// The codec over whole tensors: which kernels, and how many threads.

#include <cuda_runtime.h>

#include "cuda/codec.h"
#include "cuda/kernels.h"

namespace pysmooth::cuda {
namespace {

constexpr int64_t kSummedElements = int64_t{1} << 15;  // kCodecChunk of cpu/codec.h

int64_t parts_of(int64_t n, int64_t each) { return (n + each - 1) / each; }

int launch(Codec which, int64_t blocks, const Coding& c, void* stream) {
  Coding coding = c;
  void* arguments[] = {&coding};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernels().codec[which]),
                          dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments, 0,
                          static_cast<cudaStream_t>(stream));
}

// So many things, `each` of them to a thread.
int launch_over(Codec which, int64_t things, int64_t each, const Coding& c, void* stream) {
  return launch(which, parts_of(things, each * kThreads), c, stream);
}

}  // namespace

int64_t sums_of(int64_t n) { return parts_of(n, kFoldElements) + 1; }

int code_signs(const Coding& c, void* stream) {
  const int64_t blocks = parts_of(c.n, int64_t{kFoldElements} * kWarps);
  const int error = launch(kCodeSigns, blocks, c, stream);
  return error != 0 ? error : launch(kAddUp, 1, c, stream);
}

int subtract_signs(const Coding& c, void* stream) {
  return launch_over(kSubtractSigns, c.n, kOctet, c, stream);
}
int sum_signs(const Coding& c, void* stream) {
  return launch_over(kSumSigns, c.n, kOctet, c, stream);
}
int vote(const Coding& c, void* stream) { return launch_over(kVote, c.n, kOctet, c, stream); }

int code_natural(const Coding& c, void* stream) {
  return launch_over(kCodeNatural, c.n, kOctet, c, stream);
}
int sum_natural(const Coding& c, void* stream) {
  return launch_over(kSumNatural, c.n, kOctet, c, stream);
}

int64_t squares_of(int64_t n, int64_t block) {
  return parts_of(n, block) * parts_of(block, kSummedElements);
}

int code_levels(const Coding& c, void* stream) {
  const int64_t blocks = parts_of(c.n, c.block), pieces = squares_of(c.n, c.block);
  int error = launch_over(kSumSquares, kOctet * pieces, 1, c, stream);
  if (error == 0 && pieces > blocks) error = launch_over(kAddUnits, blocks, 1, c, stream);
  return error != 0 ? error : launch_over(kCodeLevels, c.n, kOctet, c, stream);
}
int sum_levels(const Coding& c, void* stream) {
  return launch_over(kSumLevels, c.n, kOctet, c, stream);
}

int64_t tiles_of(int64_t n) { return parts_of(n, int64_t{kWarp} * kOctet); }

int weigh(const Coding& c, void* stream) {
  constexpr int kKeyDigits = 3;  // 31 bits
  const int64_t blocks = parts_of(c.n, kFoldElements);
  Coding coding = c;
  int error = launch(kWeigh, blocks, c, stream);
  for (coding.digit = 1; error == 0 && coding.digit < kKeyDigits; ++coding.digit)
    error = launch(kNarrowDown, blocks, coding, stream);
  return error != 0 ? error : launch_over(kCountChosen, c.n, kOctet, c, stream);
}
int emit(const Coding& c, void* stream) { return launch_over(kEmit, c.n, kOctet, c, stream); }
int pack(const Coding& c, void* stream) {
  return launch_over(kPackNumbers, c.k, kOctet, c, stream);
}
int scatter(const Coding& c, void* stream) { return launch_over(kScatter, c.k, kOctet, c, stream); }
int count_marks(const Coding& c, void* stream) {
  return launch(kCountMarks, parts_of(c.ranks * tiles_of(c.n), kWarps), c, stream);
}
int spread(const Coding& c, void* stream) { return launch_over(kSpread, c.n, kOctet, c, stream); }

int code_drawn(const Coding& c, void* stream) {
  const int error = launch_over(kCombine, c.n, kOctet, c, stream);
  return error != 0 ? error : launch_over(kPickDrawn, c.k, 1, c, stream);
}
int add_drawn(const Coding& c, void* stream) { return launch_over(kDropDrawn, c.k, 1, c, stream); }

}  // namespace pysmooth::cuda

// The operands of a kernel, brought into L1 as runs of the type it computes in.
//
// A rule's kernel sees whole vectors of float (or double), one after another, and nothing else. An
// operand that lies in memory like that is used where it is. Everything else is read into a buffer
// before the kernel runs and written back after it: 16-bit types, strided tensors, the elements
// that do not fill a vector. So a rule is compiled twice, not for every pair of dtypes, and none of
// this is compiled with it.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"

PYSMOOTH_KERNELS_BEGIN

constexpr int kBlockElements = 2048;

// What a kernel reads and writes, as bits: parameter, gradient, states.
struct Touch {
  unsigned reads, writes;
};
template <class Rule>
constexpr Touch touch_of(Streams s) {
  constexpr unsigned kHeld = (1u << Rule::kStates) - 1u;
  return {(s.reads_param ? 1u : 0u) | (s.reads_grad && Rule::kReadsGrad ? 2u : 0u) |
              (s.reads_state & kHeld) << 2,
          (s.writes_param ? 1u : 0u) | (s.writes_state & kHeld) << 2};
}

// Where a run ends: after any whole number of vectors, or only where a block of the chunk does.
enum class Cut { anywhere, blocks };

// Runs of consecutive elements of a chunk, in order:
//   while (staging.next()) { kernel on staging.operand, 0 <= i < staging.count; staging.commit(); }
// The kernel may round `count` up to a whole vector: a run that ends within one lies in buffers.
template <class C>
class Staging {
 public:
  Staging(const ApplyArgs& args, Touch touch, Cut cut);
  bool next();
  void commit() {
    if ((staged_ & touch_.writes) != 0) write_back();
  }

  C* operand[kMaxOperands];
  int64_t count = 0;

 private:
  void read();
  void write_back();

  const ApplyArgs& args_;
  const Touch touch_;
  const Cut cut_;
  unsigned foreign_ = 0;  // operands that are not stored as C
  unsigned staged_ = 0;   // operands of this run that lie in room_
  int64_t done_ = 0;
  alignas(64) C room_[kMaxOperands][kBlockElements];
};

// Single elements of a chunk, wherever they are, gathered and scattered again.
template <class C>
class Gathering {
 public:
  static constexpr int kMost = 256;

  Gathering(const ApplyArgs& args, Touch touch);
  // count <= kMost elements of the chunk; all different.
  void read(const Candidate* chosen, int count);
  void write_back(int count);

  C* operand[kMaxOperands];

 private:
  const ApplyArgs& args_;
  const Touch touch_;
  int64_t at_[kMaxOperands][kMost];
  alignas(64) C room_[kMaxOperands][kMost];
};

PYSMOOTH_KERNELS_END

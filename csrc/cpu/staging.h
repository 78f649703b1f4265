// The operands of a kernel, brought into L1 as runs of the type it computes in.
//
// A rule's kernel sees whole vectors of float (or double), one after another, and nothing else. An
// operand that lies in memory like that is used where it is. Everything else is read into a buffer
// before the kernel runs and written back after it: 16-bit types, strided tensors, the elements
// that do not fill a vector, parameters that are kept in two tensors. So a rule is compiled twice,
// not for every pair of dtypes, and none of this is compiled with it.
#pragma once

#include "core/streams.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

PYSMOOTH_KERNELS_BEGIN

constexpr int kBlockElements = 2048;  // what a pass evaluates before it sums up and filters
constexpr int kStagedElements = 512;  // a run in buffers, small enough to stay in L1

template <class Body>
PYSMOOTH_HD void each_of(unsigned set, Body body) {
  for (; set != 0; set &= set - 1u) body(__builtin_ctz(set));
}

inline void* base_of(const ApplyArgs& a, int k) {
  return k == 0 ? a.param : k == 1 ? const_cast<void*>(a.grad) : a.state[k - 2];
}

PYSMOOTH_HD int64_t row_of(const RowCoefs& r, int64_t i) { return i / r.run % r.rows; }

// Of the elements from `first` on.
PYSMOOTH_HD vu32 noise_places(uint32_t first) {
  vu32 out;
  for (uint32_t j = 0; j < static_cast<uint32_t>(kFloats); ++j) out[j] = (first + j) * kNoiseStride;
  return out;
}

PYSMOOTH_HD void store_noisy(bf16* out, vec<float> x, vu32 random) {
  vector_io<float>::store_upper(out, round_bf16_stochastic<vu32>(x, random));
}

// With the parameter comes its companion: a master is operand 0, and the companion its 16-bit copy.
inline Touch with_companion(const ApplyArgs& a, Touch touch) {
  if (a.companion == 0) return touch;
  const unsigned bit = 1u << a.companion;
  if (a.storage == ParamStorage::kahan && (touch.reads & 1u) != 0) touch.reads |= bit;
  if ((touch.writes & 1u) != 0) touch.writes |= bit;
  return touch;
}

// Asks for what will be read of the element at `index` of the tensor, where it is easy to find.
PYSMOOTH_HD void prefetch_at(const ApplyArgs& a, Touch touch, int64_t index) {
  if (a.layout != nullptr) return;
  each_of(touch.reads, [&](int k) {
    __builtin_prefetch(static_cast<const char*>(base_of(a, k)) + index * itemsize(a.dtype[k]));
  });
}

// Runs of consecutive elements of a chunk, in order:
//   while (staging.next()) { kernel on staging.operand, 0 <= i < staging.count; staging.commit(); }
// No run crosses a multiple of `most` elements. The kernel may round `count` up to a whole vector:
// a run that ends within one lies in buffers.
template <class C>
class Staging {
 public:
  static constexpr int64_t kNoLimit = INT64_MAX;

  PYSMOOTH_HD Staging(const ApplyArgs& args, Touch touch, int64_t most)
      : args_(args), touch_(with_companion(args, touch)), most_(most) {
    constexpr DType kNative = sizeof(C) == 8 ? DType::f64 : DType::f32;
    for (int k = 0; k < kMaxOperands; ++k)
      if (has(touch_.reads | touch_.writes, k) && args.dtype[k] != kNative) foreign_ |= 1u << k;
    if (args.rows.coefs != nullptr) foreign_ |= touch.reads & 1u << args.rows.operand;
  }

  PYSMOOTH_HD bool next() {
    constexpr int W = lanes_of<C>;
    done_ += count;
    const int64_t left = args_.length - done_;
    if (left == 0) return false;
    const unsigned touched = touch_.reads | touch_.writes;
    const bool linear = args_.layout == nullptr;
    const int64_t most = linear && foreign_ == 0 ? most_ : kStagedElements;
    count = left < most ? left : most;
    if (linear && count > W) count -= count % W;
    staged_ = linear && count % W == 0 ? foreign_ : touched;
    for (int k = 0; k < kMaxOperands; ++k)
      if (has(touched, k))
        operand[k] =
            has(staged_, k) ? room_[k] : static_cast<C*>(base_of(args_, k)) + args_.begin + done_;
    if (args_.storage == ParamStorage::master) operand[args_.companion] = operand[0];
    if ((staged_ & touch_.reads) != 0) read(staged_ & touch_.reads);
    if (args_.rows.coefs != nullptr && has(touch_.reads, args_.rows.operand)) scale_rows();
    return true;
  }

  PYSMOOTH_HD void commit() {
    if ((staged_ & touch_.writes) != 0) write_back();
  }

  // After a commit: brings operand k's buffer to what its storage made of it.
  PYSMOOTH_HD void reread(int k) { read(1u << k); }

  C* operand[kMaxOperands];
  int64_t count = 0;

 private:
  bool is_short_tail() const {
    return foreign_ == 0 && args_.layout == nullptr && count < lanes_of<C>;
  }
  void read(unsigned set);
  void scale_rows();
  void write_back();
  void fill_noise(int pair);

  const ApplyArgs& args_;
  const Touch touch_;
  const int64_t most_;
  unsigned foreign_ = 0;  // operands that are not stored as C
  unsigned staged_ = 0;   // operands of this run that lie in room_
  int64_t done_ = 0;
  // Not a power of two apart: a load of one row would wait for a store to another.
  alignas(64) C room_[kMaxOperands][kStagedElements + 48];
  uint32_t noise_[kStagedElements + 48];  // of stochastic rounding: 16 bits each for two operands
};

// Single elements of a chunk, wherever they are, gathered and scattered again.
template <class C>
class Gathering {
 public:
  static constexpr int kMost = 512;

  Gathering(const ApplyArgs& args, Touch touch);
  // count <= kMost elements of the chunk; all different.
  void prefetch(const uint32_t* index, int count) const;
  void read(const uint32_t* index, int count);
  void write_back(int count);

  C* operand[kMaxOperands];

 private:
  const ApplyArgs& args_;
  const Touch touch_;
  uint32_t index_[kMost];  // in the order that the tensor is walked in
  int64_t at_[kMaxOperands][kMost];
  alignas(64) C room_[kMaxOperands][kMost];
};

PYSMOOTH_KERNELS_END

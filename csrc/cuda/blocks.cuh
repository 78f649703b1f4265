// Compressors that scale every block of consecutive elements by itself, on CUDA.
//
// A pass leaves a sum per block, or several where a block is longer than a run; scale_blocks
// (scales.cuh) makes scales of them, in double; whoever compresses looks up the scale of the block
// that an element is in. Sums and scales are the CPU backend's to the bit.
#pragma once

#include "cuda/fold.cuh"

PYSMOOTH_KERNELS_BEGIN

using cuda::kMostScales;

// What a block's compressor multiplies by, and divides by.
template <class C>
struct BlockScale {
  C scale, inverse;
};

template <class C>
PYSMOOTH_DEVICE BlockScale<C>* scales_of(const View& plan, const Entry& e) {
  return reinterpret_cast<BlockScale<C>*>(plan.block_scales + e.first_block * cuda::kBlockBytes);
}

// Puts the scales of an element's block into a rule's constants: those of the first kPasses passes.
template <class Rule, class C, int kPasses>
class BlockScales {
 public:
  PYSMOOTH_DEVICE BlockScales(const View& plan, int t)
      : scales_(scales_of<C>(plan, plan.entries[t])), shift_(plan.block_shift) {}
  PYSMOOTH_DEVICE void enter(int64_t index, typename Rule::template Hyper<C>* hyper) {
    const int64_t block = index >> shift_;
    if (block == block_) return;
    block_ = block;
    put(scales_[kMostScales * block], &Rule::template compressor<0>(*hyper));
    if constexpr (kPasses > 1)
      put(scales_[kMostScales * block + 1], &Rule::template compressor<1>(*hyper));
  }

 private:
  template <class Compressor>
  PYSMOOTH_DEVICE static void put(const BlockScale<C>& from, Compressor* to) {
    to->scale = from.scale;
    to->inverse = from.inverse;
  }
  const BlockScale<C>* scales_;
  int shift_;
  int64_t block_ = -1;
};

template <class Rule, class C>
class BlockScales<Rule, C, 0> {
 public:
  PYSMOOTH_DEVICE BlockScales(const View&, int) {}
  PYSMOOTH_DEVICE void enter(int64_t, typename Rule::template Hyper<C>*) {}
};

// The sums of blocks shorter than a row, in one row of 64 values: every place has one.
template <class A>
struct RowSums {
  using C = typename A::C;
  C value[A::kGroup] = {};

  PYSMOOTH_DEVICE void add(int place, C x) {
    change_at(value, place, [x](C) { return x; });
  }
  PYSMOOTH_DEVICE static double term(Sum kind, C x, bool wide) {
    if (kind == Sum::abs) return static_cast<double>(absolute(x));
    return wide ? static_cast<double>(x) * static_cast<double>(x) : static_cast<double>(x * x);
  }
  // Calls keep(b, sum) for every block of the row. All threads of a warp come here.
  template <class Keep>
  PYSMOOTH_DEVICE void total(Sum kind, int head, int block, double* lanes, Keep keep) const {
    using Us = Team<A::kGroup>;
    const Us me;
    const auto add_up = [&](bool wide) {
      PYSMOOTH_UNROLL
      for (int j = 0; j < A::kGroup; ++j)
        lanes[(head + A::kGroup * me.member + j) % kRow] = term(kind, value[j], wide);
      __syncwarp();
      for (int half = block / 2; half > 0; half /= 2) {
        for (int i = me.member; i < kRow; i += Us::kMembers)
          if (i % block < half) lanes[i] += lanes[i + half];
        __syncwarp();
      }
    };
    add_up(false);
    uint32_t doubtful = 0;  // sums that float cannot be trusted with, as bits
    int number = 0;
    for (int b = me.member; b < kRow / block; b += Us::kMembers, ++number) {
      const double sum = lanes[b * block];
      keep(b, sum);
      const double least = kind == Sum::squares ? 7.8886090522101181e-31 : 0.0;
      if (sizeof(C) == 4 && !(sum >= least && sum <= 3.4028234663852886e38))
        doubtful |= 1u << number;
    }
    __syncwarp();
    if (!__any_sync(kEveryLane, doubtful != 0)) return;
    add_up(true);
    number = 0;
    for (int b = me.member; b < kRow / block; b += Us::kMembers, ++number)
      if ((doubtful >> number & 1u) != 0) keep(b, lanes[b * block]);
    __syncwarp();
  }
};

PYSMOOTH_KERNELS_END

// A whole step in one launch, on CUDA: what are launches of their own otherwise are parts of a
// kernel, between which all blocks meet. For models so small that a launch takes longer than its
// work. All blocks are on the device at the same time, so each does as many items as fall to it;
// who does an item changes nothing of what becomes of it.
#pragma once

#include "cuda/apply.cuh"
#include "cuda/begin.cuh"
#include "cuda/put.cuh"
#include "cuda/reduce.cuh"

PYSMOOTH_KERNELS_BEGIN

// What all rules have in common. Functions that are called, so that it is compiled once and not
// once per rule.
struct SingleParts {
  static PYSMOOTH_APART void reduce(const View& plan, const Work& work, double* lanes) {
    constexpr Reduction kind = Reduction::sum_squares;
    PYSMOOTH_ROLLED
    for (int64_t i = warp_number(); i < work.count; i += int64_t{gridDim.x} * kWarps)
      reduce_any<kind>(plan, item_at(plan, work, i), lanes);
    if (last_block(&plan.arrived[plan.tensors], gridDim.x)) finalize<kind>(plan);
  }
  static PYSMOOTH_APART void prepare(const View& plan) {
    const int64_t all = int64_t{gridDim.x} * kThreads;
    int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (begin_step(plan, t == 0)) return;
    PYSMOOTH_ROLLED
    for (; t < plan.tensors; t += all) prepare_tensor(plan, -1, static_cast<int>(t));
  }
};

template <class Rule, class A>
PYSMOOTH_KERNEL single(const PYSMOOTH_IN_PLACE View plan, const PYSMOOTH_IN_PLACE Work reducing,
                       const PYSMOOTH_IN_PLACE Work applying,
                       const PYSMOOTH_IN_PLACE cuda::Carried carried) {
  PYSMOOTH_SHARED(Lanes, lanes);
  if (carried.words > 0) {
    if (blockIdx.x == 0) put_words(carried.at, carried.words, carried.payload);
    PYSMOOTH_SYNC_GRID();
  }
  if (plan.reduces) {
    SingleParts::reduce(plan, reducing, lanes[warp_id()][0]);
    PYSMOOTH_SYNC_GRID();
  }
  SingleParts::prepare(plan);
  PYSMOOTH_SYNC_GRID();
  if (plan.status->skip != 0) return;
  PYSMOOTH_ROLLED
  for (int64_t i = warp_number(); i < applying.count; i += int64_t{gridDim.x} * kWarps) {
    const Item item = item_at(plan, applying, i);
    if (item.tensor >= 0) apply_item<Rule, A, false>(plan, applying, item);
  }
}

PYSMOOTH_KERNELS_END

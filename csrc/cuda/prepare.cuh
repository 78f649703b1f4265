// prepare, on CUDA: a launch of its own, before and after each pass, for what is computed once per
// tensor. Knows all rules.
#pragma once

#include "cuda/begin.cuh"

PYSMOOTH_KERNELS_BEGIN

PYSMOOTH_KERNEL prepare(View plan, Work work) {
  const bool first = work.stage < 0;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool refused = first ? begin_step(plan, t == 0) : plan.status->skip != 0;
  if (first && plan.absorbs && t < plan.tensors) begin_absorbed(plan, static_cast<int>(t));
  if (!refused && t < plan.tensors) prepare_tensor(plan, work.stage, static_cast<int>(t));
}

PYSMOOTH_KERNELS_END

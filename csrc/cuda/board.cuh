// Between devices, where a plan's tensors lie on several. Each device has a plan of all of them,
// but works on its own. What was computed of a tensor as a whole it writes to its row of the board;
// when it has the other devices' rows as well, it goes on as if it had worked on all tensors: in
// the same order, and so with the same bits on every device, whichever tensors lie where.
#pragma once

#include "cuda/passes.cuh"

PYSMOOTH_KERNELS_BEGIN

// This device's row. A thread per tensor.
PYSMOOTH_KERNEL publish(View plan, Work) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= plan.tensors || !is_mine(plan, static_cast<int>(t))) return;
  const Entry& e = plan.entries[t];
  Shared out{};
  out.nonfinite = plan.nonfinite[t];
  if (is_active(plan, static_cast<int>(t))) out.value = plan.value[t];
  if (e.cut >= 0) {
    out.clipped = plan.row_clipped[plan.row_chunks + e.cut];
    out.least = plan.row_least[plan.row_chunks + e.cut];
  }
  if (e.norm_sq != nullptr) out.norm_sq = *e.norm_sq;
  plan.board[int64_t{plan.site} * plan.tensors + t] = out;
}

// What the others have told. A whole block.
PYSMOOTH_DEVICE void adopt(const View& plan) {
  for (int t = static_cast<int>(threadIdx.x); t < plan.tensors; t += kThreads) {
    if (is_mine(plan, t)) continue;
    const Entry& e = plan.entries[t];
    const Shared& told = told_of(plan, t);
    plan.nonfinite[t] = told.nonfinite;
    plan.value[t] = told.value;
    if (e.cut < 0) continue;
    plan.row_clipped[plan.row_chunks + e.cut] = told.clipped;
    plan.row_least[plan.row_chunks + e.cut] = told.least;
  }
  __syncthreads();
}

template <Reduction kind>
PYSMOOTH_KERNEL conclude(View plan, Work) {
  adopt(plan);
  finalize<kind>(plan);
}

PYSMOOTH_KERNEL conclude_pass(View plan, Work work) {
  if (plan.status->skip != 0) return;
  adopt(plan);
  finish_stage(plan, work.stage);
}

PYSMOOTH_KERNELS_END

// Between processes, where a plan's tensors are parts of larger ones. After a pass each process
// tells what its parts come to; torch.distributed adds that up over those that hold parts of the
// same tensor, in place; then all go on with the sums of whole tensors. The stages of a pipeline
// hold different tensors: they add up what their scope units come to.
#pragma once

#include "cuda/passes.cuh"
#include "cuda/select.cuh"

PYSMOOTH_KERNELS_BEGIN

using cuda::kIsNan;
using cuda::kJoinedNan;
using cuda::kJoinedNonfinite;
using cuda::kJoinedTorn;
using cuda::kJoinedUnits;
using cuda::kTornElsewhere;
using cuda::PartSum;

PYSMOOTH_DEVICE bool is_largest(Reduction kind) {
  return kind == Reduction::max_abs || kind == Reduction::min_abs;
}

// Numbers as they travel. A minimum goes as a maximum, and NaN, which a maximum may lose, as a
// flag.
PYSMOOTH_DEVICE double to_send(Reduction kind, double value) {
  if (is_largest(kind) && value != value) return 0.0;
  return kind == Reduction::min_abs ? -value : value;
}
PYSMOOTH_DEVICE double received(Reduction kind, double value, bool nan) {
  if (is_largest(kind) && nan) return __builtin_nan("");
  return kind == Reduction::min_abs ? -value : value;
}

PYSMOOTH_DEVICE void tell(const View& plan, int t, Reduction kind, double value, bool nonfinite) {
  const bool here = is_counted(plan, t), nan = is_largest(kind) && value != value;
  plan.parts[t] = {to_send(kind, value),
                   nan         ? kIsNan
                   : nonfinite ? 1.0
                               : 0.0,
                   here ? 1.0 : 0.0, here ? 0.0 : 1.0};
}

// What this process has, after reduce. work.stage: the reduction. A thread per tensor.
PYSMOOTH_KERNEL tell_parts(View plan, Work work) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= plan.tensors) return;
  const auto t = static_cast<int>(i);
  const auto kind = static_cast<Reduction>(work.stage);
  const double none = kind == Reduction::min_abs ? __builtin_inf() : 0.0;
  tell(plan, t, kind, is_active(plan, t) ? plan.value[t] : none, plan.nonfinite[t] != 0);
}

// The same after pass work.stage.
PYSMOOTH_KERNEL tell_pass(View plan, Work work) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= plan.tensors) return;
  const auto t = static_cast<int>(i);
  const bool skips = plan.status->skip != 0;  // then so do all others, and nobody looks at it
  const bool sums = !skips && is_active(plan, t) && has_stage(plan, work.stage, t) &&
                    plan.prepared[t].sum[work.stage] != Sum::none;
  tell(plan, t, Reduction::sum_squares, sums ? plan.value[t] : 0.0, false);
}

// What all have, after a pass or reduce. A whole block.
PYSMOOTH_DEVICE void adopt_parts(const View& plan, Reduction kind, bool nonfinite) {
  if (threadIdx.x == 0) plan.status->torn = 0;
  __syncthreads();
  for (int t = static_cast<int>(threadIdx.x); t < plan.tensors; t += kThreads) {
    const PartSum& part = plan.parts[t];
    plan.value[t] = received(kind, part.value, part.flag >= kIsNan);
    if (nonfinite) plan.nonfinite[t] = part.flag != 0.0 ? 1u : 0u;
    if (part.here == 0.0 || part.missing == 0.0) continue;
    plan.status->torn = 1;
    plan.status->torn_tensor = t + 1;
  }
  __syncthreads();
}

template <Reduction kind>
PYSMOOTH_KERNEL conclude_parts(View plan, Work) {
  adopt_parts(plan, kind, true);
  finalize<kind>(plan);
}

PYSMOOTH_KERNEL conclude_parts_of_pass(View plan, Work work) {
  if (plan.status->skip != 0) return;
  adopt_parts(plan, Reduction::sum_squares, false);
  finish_stage(plan, work.stage);
  if (threadIdx.x == 0 && plan.status->torn != 0) plan.status->skip = 1;
}

// ---- with the stages of a pipeline --------------------------------------------------------------

// Units of this scope are those of other stages as well; single tensors are not.
PYSMOOTH_DEVICE bool joins_units(Scope scope) {
  return scope == Scope::global || scope == Scope::group;
}

PYSMOOTH_DEVICE void learn_of_torn(const View& plan) {
  if (threadIdx.x != 0 || plan.joined[kJoinedTorn] == 0.0 || plan.status->torn != 0) return;
  plan.status->torn = 1;
  plan.status->torn_tensor = kTornElsewhere;
}

// What this stage has; whether a unit has anything is kept in unit_sum.
template <Reduction kind>
PYSMOOTH_KERNEL total_parts(View plan, Work) {
  PYSMOOTH_SHARED(int, nan);
  if (threadIdx.x == 0) nan = 0;
  adopt_parts(plan, kind, true);
  const bool nonfinite = keep_nonfinite(plan);
  total_units<kind>(plan, [&](int u, double total, bool any) {
    plan.unit_sum[u] = any ? 1.0 : 0.0;
    plan.norms[u] = total;
    if (!joins_units(plan.scope)) return;
    plan.joined[kJoinedUnits + u] = to_send(kind, total);
    if (is_largest(kind) && total != total) atomicOr(&nan, 1);
  });
  if (threadIdx.x != 0) return;
  plan.joined[kJoinedNonfinite] = nonfinite ? 1.0 : 0.0;
  plan.joined[kJoinedNan] = nan != 0 ? 1.0 : 0.0;
  plan.joined[kJoinedTorn] = plan.status->torn;
}

// What all stages have. Where squared norms are accumulated, those of this stage come next.
template <Reduction kind>
PYSMOOTH_KERNEL conclude_units(View plan, Work) {
  const Units units(plan, plan.scope);
  const bool joins = joins_units(plan.scope), nan = plan.joined[kJoinedNan] != 0.0;
  for (int u = static_cast<int>(threadIdx.x); u < units.count; u += kThreads) {
    const double total = joins ? received(kind, plan.joined[kJoinedUnits + u], nan) : plan.norms[u];
    const bool any = plan.unit_sum[u] != 0.0 || total != neutral<kind>();
    plan.norms[u] = any ? norm_of<kind>(plan, total) : 0.0;
  }
  __syncthreads();
  clip_by_norms(plan);
  if (threadIdx.x == 0) plan.status->nonfinite = plan.joined[kJoinedNonfinite] != 0.0 ? 1 : 0;
  learn_of_torn(plan);
  if (!plan.accumulates) return;
  sum_clipped(plan, unscale_of(plan));
  if (!joins) return accumulate_norms(plan);
  for (int u = static_cast<int>(threadIdx.x); u < units.count; u += kThreads)
    plan.joined[kJoinedUnits + u] = plan.unit_sum[u] < 0.0 ? 0.0 : plan.unit_sum[u];
}

PYSMOOTH_KERNEL conclude_accumulated(View plan, Work) {
  const Units units(plan, plan.scope);
  for (int u = static_cast<int>(threadIdx.x); u < units.count; u += kThreads)
    if (!(plan.unit_sum[u] < 0.0) || plan.joined[kJoinedUnits + u] != 0.0)
      plan.unit_sum[u] = plan.joined[kJoinedUnits + u];
  __syncthreads();
  accumulate_norms(plan);
}

// The same for the sums of pass work.stage, and for how many elements they are of.
PYSMOOTH_KERNEL total_parts_of_pass(View plan, Work work) {
  if (plan.status->skip != 0) return;
  adopt_parts(plan, Reduction::sum_squares, false);
  total_stage(plan, work.stage);
  const int count = Units(plan, plan.stage_scope[work.stage]).count;
  const double* const elements = plan.unit_sum + plan.tensors + plan.groups + 1;
  for (int u = static_cast<int>(threadIdx.x); u < count; u += kThreads) {
    plan.joined[kJoinedUnits + u] = plan.unit_sum[u];
    plan.joined[kJoinedUnits + count + u] = elements[u];
  }
  if (threadIdx.x == 0) plan.joined[kJoinedTorn] = plan.status->torn;
}

PYSMOOTH_KERNEL conclude_units_of_pass(View plan, Work work) {
  if (plan.status->skip != 0) return;
  const int count = Units(plan, plan.stage_scope[work.stage]).count;
  double* const elements = plan.unit_sum + plan.tensors + plan.groups + 1;
  for (int u = static_cast<int>(threadIdx.x); u < count; u += kThreads) {
    plan.unit_sum[u] = plan.joined[kJoinedUnits + u];
    elements[u] = plan.joined[kJoinedUnits + count + u];
  }
  __syncthreads();
  tell_stage(plan, work.stage);
  learn_of_torn(plan);
  if (threadIdx.x == 0 && plan.status->torn != 0) plan.status->skip = 1;
}

// ---- a selection from all parts of a tensor -----------------------------------------------------

// Digit work.stage of the threshold, from the histograms of all. A block per unit.
PYSMOOTH_KERNEL take_digit_of_all(View plan, Work work) {
  if (plan.status->skip != 0) return;
  Unit& u = plan.units[blockIdx.x];
  if (u.jointly == 0) return;
  uint64_t* const all = plan.histogram + int64_t{blockIdx.x} * kDigits;
  const bool wide = u.wide != 0;
  // An empty part has nothing to select, and got the others' numbers all the same.
  if (u.k != 0 && u.threshold.settled == 0 && work.stage < digits_of(wide, u.place_bits))
    take_digit(&u.threshold, Digit(work.stage, wide, u.place_bits), [&](int i) { return all[i]; });
  for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kThreads) all[i] = 0;
}

PYSMOOTH_KERNELS_END

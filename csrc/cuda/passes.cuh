// From the sums of tensors in a pass before apply to what rules are told of it.
#pragma once

#include "cuda/finalize.cuh"

PYSMOOTH_KERNELS_BEGIN

// Whether the sums of a pass are of several devices' tensors, or of parts.
PYSMOOTH_DEVICE bool shares_pass(const View& plan, int stage) {
  const Scope scope = plan.stage_scope[stage];
  if (plan.parts != nullptr) return scope != Scope::block;
  return plan.board != nullptr && (scope == Scope::global || scope == Scope::group);
}

PYSMOOTH_DEVICE bool has_stage(const View& plan, int stage, int t) {
  bool out = false;
  with_rule(Rules{}, plan.entries[t].rule,
            [&](auto rule) { out = stage < decltype(rule)::kStages; });
  return out && is_counted(plan, t);
}

// The sums of a pass and the numbers of elements, over its scope, to unit_sum. A whole block.
__device__ inline void total_stage(const View& plan, int stage) {
  const Units units(plan, plan.stage_scope[stage]);
  double* const elements = plan.unit_sum + plan.tensors + plan.groups + 1;
  const auto takes_part = [&](int t) { return has_stage(plan, stage, t); };
  const auto add = [](double total, double x) { return total + x; };
  each_unit(
      plan, units, 0.0, takes_part,
      [&](int t) { return plan.prepared[t].sum[stage] == Sum::none ? 0.0 : plan.value[t]; }, add,
      [&](int u, double total, bool) { plan.unit_sum[u] = total; });
  each_unit(
      plan, units, 0.0, takes_part,
      [&](int t) { return static_cast<double>(plan.entries[t].elements); }, add,
      [&](int u, double total, bool) { elements[u] = total; });
}

// What rules are told of these.
__device__ inline void tell_stage(const View& plan, int stage) {
  const Units units(plan, plan.stage_scope[stage]);
  const double* const elements = plan.unit_sum + plan.tensors + plan.groups + 1;
  for (int t = static_cast<int>(threadIdx.x); t < plan.tensors; t += kThreads) {
    if (!has_stage(plan, stage, t)) continue;
    const int u = units.of(plan, t);
    plan.scalars[t].stage[stage] = plan.prepared[t].sum[stage] == Sum::squares
                                       ? std::sqrt(plan.unit_sum[u])
                                       : plan.unit_sum[u] / elements[u];
  }
}

__device__ inline void finish_stage(const View& plan, int stage) {
  total_stage(plan, stage);
  tell_stage(plan, stage);
}

PYSMOOTH_KERNELS_END

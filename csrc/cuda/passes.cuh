// From the sums of tensors in a pass before apply to what rules are told of it.
#pragma once

#include "cuda/finalize.cuh"

PYSMOOTH_KERNELS_BEGIN

// Whether the sums of a pass are of several devices' tensors.
PYSMOOTH_DEVICE bool shares_pass(const View& plan, int stage) {
  const Scope scope = plan.stage_scope[stage];
  return plan.board != nullptr && (scope == Scope::global || scope == Scope::group);
}

// What the sums of a pass come to, over its scope.
__device__ inline void finish_stage(const View& plan, int stage) {
  const Units units(plan, plan.stage_scope[stage]);
  double* const elements = plan.unit_sum + plan.tensors + plan.groups + 1;
  const auto takes_part = [&](int t) {
    bool has_stage = false;
    with_rule(Rules{}, plan.entries[t].rule,
              [&](auto rule) { has_stage = stage < decltype(rule)::kStages; });
    return has_stage && is_active(plan, t);
  };
  const auto add = [](double total, double x) { return total + x; };
  each_unit(
      plan, units, 0.0, takes_part,
      [&](int t) { return plan.prepared[t].sum[stage] == Sum::none ? 0.0 : plan.value[t]; }, add,
      [&](int u, double total, bool) { plan.unit_sum[u] = total; });
  each_unit(
      plan, units, 0.0, takes_part,
      [&](int t) { return static_cast<double>(plan.entries[t].numel); }, add,
      [&](int u, double total, bool) { elements[u] = total; });
  for (int t = static_cast<int>(threadIdx.x); t < plan.tensors; t += kThreads) {
    if (!takes_part(t)) continue;
    const int u = units.of(plan, t);
    plan.scalars[t].stage[stage] = plan.prepared[t].sum[stage] == Sum::squares
                                       ? std::sqrt(plan.unit_sum[u])
                                       : plan.unit_sum[u] / elements[u];
  }
}

PYSMOOTH_KERNELS_END

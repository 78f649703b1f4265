// admit, on CUDA: whether a gradient is taken into its states before the step, and with which
// numbers.
//
// A gradient comes with the launch, so that nothing is sent, and a captured graph has it of its
// own. Warps look at it where the policy refuses what is not finite; the last one decides, and
// makes the constants of the pass that follows (absorb.cuh). Counting is the device's business: the
// host does not see replays.
#pragma once

#include "cuda/begin.cuh"
#include "cuda/reduce.cuh"

PYSMOOTH_KERNELS_BEGIN

using cuda::Intake;

// Whether the warp's share, `rows` rows of 64 elements per team, holds something that is not
// finite.
template <class T>
PYSMOOTH_DEVICE bool is_bad(const View& plan, const Entry& e, const void* grad, int64_t part,
                            int rows) {
  using Us = Team<16 / static_cast<int>(sizeof(T))>;
  bool bad = false;
  each_element(run_of<T>(plan, e, grad, part * Us::kTeams + Us().team, rows * kRow),
               // 0 for finite numbers, NaN for all others
               [&bad](int, compute_t<T> x) { bad = bad || x - x != compute_t<T>(0); });
  return bad;
}

PYSMOOTH_DEVICE bool is_bad(const View& plan, const Entry& e, const void* grad, int64_t part,
                            int rows) {
  switch (static_cast<DType>(e.dtype[1])) {
    case DType::f32:
      return is_bad<float>(plan, e, grad, part, rows);
    case DType::f64:
      return is_bad<double>(plan, e, grad, part, rows);
    case DType::bf16:
      return is_bad<bf16>(plan, e, grad, part, rows);
    default:
      return is_bad<f16>(plan, e, grad, part, rows);
  }
}

// What pass 0 is told of a gradient that comes by itself.
PYSMOOTH_DEVICE void prepare_intake(const View& plan, const Intake& in) {
  const int t = in.tensor;
  const Entry& e = plan.entries[t];
  double hyper[kMaxHyper];
  read_hyper(in.group, hyper);
  for (int i = 0; i < kMaxHyper; ++i)
    if (plan.taken[t] != 0 && has(in.once, i)) hyper[i] = 0.0;
  Scalars s;
  s.grad_coef = in.group.maximize != 0 ? -1.0 : 1.0;
  s.zero_nonfinite = plan.policy == NonFinite::zero;
  if (e.scale != nullptr) {  // what was sent in the last step is taken off by this pass alone
    s.last_scale = *e.scale;
    *e.scale = 0.0;
  }
  Prepared& out = plan.prepared[t];
  out.step = static_cast<uint32_t>(*e.steps);
  if (e.stochastic != 0) out.noise = NoiseKey(out.step, static_cast<uint32_t>(t));
  with_rule(Rules{}, e.rule, [&](auto rule) {
    using Rule = decltype(rule);
    if constexpr (Rule::kAbsorbs) {
      if (static_cast<DType>(e.dtype[0]) == DType::f64)
        prepare_rule<double>(rule, hyper, s, &out);
      else
        prepare_rule<float>(rule, hyper, s, &out);
      out.reads_param[0] = Rule::reads_param(hyper, 0);
    }
  });
}

PYSMOOTH_KERNEL admit(View plan, Work work, Intake in) {
  const int64_t part = warp_number();
  if (part >= work.count) return;
  const int t = in.tensor;
  if (may_refuse(plan)) {
    const bool bad = is_bad(plan, plan.entries[t], in.grad, part, work.rows);
    if (__any_sync(kEveryLane, bad) && lane_id() == 0) atomicOr(&plan.nonfinite[t], 1u);
  }
  if (!last_warp(&plan.arrived[t], static_cast<uint32_t>(work.count)) || lane_id() != 0) return;
  const bool refused = plan.nonfinite[t] != 0;
  plan.nonfinite[t] = 0;
  plan.incoming[t] = refused ? nullptr : in.grad;
  if (refused) {
    plan.nonfinite[2 * plan.tensors + t] = 1;
    atomicAdd(&plan.status->skipped, 1ull);  // others may come at the same time
    return;
  }
  prepare_intake(plan, in);
  plan.taken[t] += 1;
}

PYSMOOTH_KERNELS_END

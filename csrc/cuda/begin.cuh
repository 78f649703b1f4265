// What apply and the passes need to know of each tensor, one thread each.
//
// All that is computed once, and in double, happens here, so that the kernels that stream memory
// hold no double-precision instruction. Step counts and accumulated norms move on here as well;
// where the step is refused nothing does.
#pragma once

#include "cuda/finalize.cuh"

PYSMOOTH_KERNELS_BEGIN

// Whether the policy refuses gradients that are not finite.
PYSMOOTH_DEVICE bool may_refuse(const View& plan) {
  return plan.policy == NonFinite::skip || plan.policy == NonFinite::raise;
}
PYSMOOTH_DEVICE bool is_refused(const View& plan) {
  return plan.reduces && plan.status->nonfinite != 0 && may_refuse(plan);
}

// The first time in a step: everything that does not come from a pass.
PYSMOOTH_DEVICE void begin_tensor(const View& plan, int t, const double* hyper) {
  const Entry& e = plan.entries[t];
  const GroupInput& group = plan.inputs[e.group];
  Scalars s;
  // Where rows are clipped, their coefficients hold everything (rows.cuh).
  const double coef = e.cut >= 0 ? 1.0 : (plan.reduces ? plan.coefs[t] : 1.0) * unscale_of(plan);
  s.grad_coef = group.maximize != 0 ? -coef : coef;
  s.clip_value = group.clip_value;
  s.first = plan.started[t] == 0;
  s.zero_nonfinite = plan.policy == NonFinite::zero;
  if (e.norm_sq != nullptr) {
    s.norm_sq_before = plan.norm_sq[t];
    s.norm_sq = plan.norm_sq[plan.tensors + t];
  }
  if (e.scale != nullptr) s.last_scale = *e.scale;
  if (e.first_mark >= 0) s.mark_scale = plan.select.scale_of(e.numel);
  Prepared& out = plan.prepared[t];
  if (e.steps != nullptr) {
    const double step = static_cast<double>(*e.steps) + 1.0;
    with_rule(Rules{}, e.rule, [&](auto rule) { rule.derive(hyper, step, s.derived); });
    out.step = static_cast<uint32_t>(*e.steps);
    *e.steps += 1.0f;
  }
  if (e.stochastic != 0) out.noise = NoiseKey(out.step, static_cast<uint32_t>(t));
  out.unit_coef = (e.cut >= 0 ? plan.coefs[t] : s.grad_coef) == 1.0;
  plan.started[t] = 1;
  plan.scalars[t] = s;
}

template <class C, class T>
PYSMOOTH_DEVICE void keep(unsigned char* at, const T& value) {
  static_assert(sizeof(T) <= cuda::kHyperBytes && std::is_trivially_copyable_v<T>);
  *reinterpret_cast<T*>(at) = value;
}

template <class C, class Rule>
PYSMOOTH_DEVICE void prepare_rule(Rule, const double* hyper, const Scalars& s, Prepared* out) {
  keep<C>(out->hyper, Rule::template prepare<C>(hyper, s));
  keep<C>(out->take, GradientIn<C>(s));
}

// Where gradients are absorbed: whoever has taken one in takes part, and begins anew. Nobody reads
// a gradient then, and a count is no address.
PYSMOOTH_DEVICE void begin_absorbed(const View& plan, int t) {
  const_cast<const void**>(plan.grads)[t] =
      reinterpret_cast<const void*>(static_cast<uintptr_t>(plan.taken[t]));
  plan.taken[t] = 0;
}

// stage: the pass that was just done; -1 at the beginning.
PYSMOOTH_DEVICE void prepare_tensor(const View& plan, int stage, int t) {
  const Entry& e = plan.entries[t];
  const bool mine = is_mine(plan, t);
  if (stage < 0 && e.norm_sq != nullptr && mine) *e.norm_sq = plan.norm_sq[plan.tensors + t];
  if (!is_counted(plan, t)) return;
  double hyper[kMaxHyper];
  read_hyper(plan.inputs[e.group], hyper);
  Prepared& out = plan.prepared[t];
  const bool empty = e.numel == 0;  // a part, whose steps count as the others' do
  if (stage < 0 && empty && e.steps != nullptr) *e.steps += 1.0f;
  if (stage < 0 && mine && !empty) begin_tensor(plan, t, hyper);
  if (!mine || empty) {  // enough to add up its sums, and to know that it has begun
    plan.started[t] = 1;
    if (empty && stage == 0 && e.scale != nullptr) *e.scale = plan.scalars[t].stage[0];
    with_rule(Rules{}, e.rule, [&](auto rule) {
      for (int k = 0; k < decltype(rule)::kStages; ++k) out.sum[k] = rule.stage_sum(hyper, k);
    });
    return;
  }
  const Scalars& s = plan.scalars[t];
  if (stage == 0 && e.scale != nullptr) *e.scale = s.stage[0];
  with_rule(Rules{}, e.rule, [&](auto rule) {
    using Rule = decltype(rule);
    if (static_cast<DType>(e.dtype[0]) == DType::f64)
      prepare_rule<double>(rule, hyper, s, &out);
    else
      prepare_rule<float>(rule, hyper, s, &out);
    for (int k = 0; k < Rule::kStages; ++k) {
      out.sum[k] = Rule::stage_sum(hyper, k);
      out.reads_param[k] = Rule::reads_param(hyper, k);
    }
    out.draw = Rule::draw(hyper);
    out.selects = selections_of<Rule> > 0 && !Rule::selects_nothing(hyper);
  });
}

// Whether nothing happens in this step; who is told so `writes` it down.
PYSMOOTH_DEVICE bool begin_step(const View& plan, bool writes) {
  const bool overflow = overflowed(plan);
  const bool torn = plan.parts != nullptr && plan.reduces && plan.status->torn != 0;
  const bool refused = overflow || torn || is_refused(plan);
  if (writes) {
    plan.status->skip = refused ? 1 : 0;
    plan.status->steps += 1;
    plan.status->skipped += refused && !overflow && !torn ? 1 : 0;
  }
  return refused;
}

PYSMOOTH_KERNELS_END

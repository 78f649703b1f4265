// absorb, on CUDA: pass 0 of a rule for one tensor, before the step. The gradient is in the states
// then, and may go; the step finds it there (source.cuh).
#pragma once

#include "cuda/access.cuh"

PYSMOOTH_KERNELS_BEGIN

template <class Rule, class A>
PYSMOOTH_KERNEL take_in(View plan, Work work) {
  using C = typename A::C;
  using P = Port<Rule, A, UsePass<Rule, 0>>;
  const int64_t part = warp_number();
  if (part >= work.count || plan.grads[work.tensor] == nullptr) return;
  const Prepared& prepared = plan.prepared[work.tensor];
  const Constants<Rule, C> constants(prepared);
  Span<Rule, A> span(plan, work.tensor, P::kTouched);
  span.take_part(static_cast<int>(part), work.rows);
  // The noise of pass 0, as in a step.
  walk<P>(span, constants.take, Drawer<C>(prepared, work.tensor),
          prepared.noise.shifted(kNoisePass), prepared.reads_param[0],
          [&](typename P::Element& x, int, int, bool, int64_t) {
            Rule::template source<0>(x, constants.hyper);
          });
}

PYSMOOTH_KERNELS_END

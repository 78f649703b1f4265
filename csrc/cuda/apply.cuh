// apply, on CUDA: one pass over parameter, gradient and states with a rule's update.

#pragma once

#include "cuda/access.cuh"
#include "cuda/blocks.cuh"

PYSMOOTH_KERNELS_BEGIN

// A bit per element of what a warp evaluates in one row: set where the value is not at least 0.
// Word j is made of every lane's element j.
template <class A>
PYSMOOTH_DEVICE uint32_t* signs_of(const View& plan, const Work& work, int row) {
  return plan.signs + work.first + (warp_number() * work.rows + row) * A::kGroup;
}

template <class Rule, class A, bool kBlocks>
PYSMOOTH_DEVICE void apply_item(const View& plan, const Work& work, const Item& item) {
  using C = typename A::C;
  using P = Port<Rule, A, UseApply<Rule>>;
  const Prepared& prepared = plan.prepared[item.tensor];
  if (plan.skip_unit_coef && prepared.unit_coef) return;
  Constants<Rule, C> constants(prepared);
  BlockScales<Rule, C, kBlocks ? Rule::kScales : 0> scales(plan, item.tensor);
  Span<Rule, A> span(plan, item.tensor, P::kTouched);
  span.take_part(item.part, work.rows);
  walk<P>(span, constants.take, Drawer<C>(prepared, item.tensor), prepared.noise, true,
          [&](typename P::Element& x, int row, int j, bool there, int64_t index) {
            if (there) scales.enter(index, &constants.hyper);
            if constexpr (Rule::kSendsSigns)
              x.grad = (signs_of<A>(plan, work, row)[j] >> lane_id() & 1u) != 0 ? C(-1) : C(1);
            Rule::update(x, constants.hyper);
          });
}

template <class Rule, class A, bool kBlocks = false>
PYSMOOTH_KERNEL apply(View plan, Work work) {
  if (plan.status->skip != 0) return;
  const Item item = item_of(plan, work);
  if (item.tensor >= 0) apply_item<Rule, A, kBlocks>(plan, work, item);
}

PYSMOOTH_KERNELS_END

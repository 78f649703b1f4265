// What compressors that scale every block by itself scale it by: made of the sums that a pass left.
// A kernel for all rules.
#pragma once

#include "cuda/blocks.cuh"
#include "cuda/finalize.cuh"

PYSMOOTH_KERNELS_BEGIN

template <class Rule, class C>
PYSMOOTH_DEVICE void keep_scale(const double* hyper, int stage, double told, BlockScale<C>* at) {
  Scalars s;
  s.stage[stage] = told;
  auto h = Rule::template prepare<C>(hyper, s);
  const auto& c = stage == 0 ? Rule::template compressor<0>(h)
                             : Rule::template compressor<Rule::kScales - 1>(h);
  at[stage] = {c.scale, c.inverse};
}

// A thread per block, after the pass work.stage.
PYSMOOTH_KERNEL scale_blocks(View plan, Work work) {
  if (plan.status->skip != 0) return;
  const int64_t i = warp_number();
  const Item item = i < work.count ? work.items[i] : Item{-1, 0};
  if (item.tensor < 0 || plan.grads[item.tensor] == nullptr) return;
  const Entry& e = plan.entries[item.tensor];
  const Sum kind = plan.prepared[item.tensor].sum[work.stage];
  const double* const partial = plan.partial + plan.partial_first[item.tensor];
  const int64_t size = plan.select.block, runs = (e.numel + plan.block_run - 1) / plan.block_run;
  const int64_t each = size / plan.block_run, first = int64_t{item.part} * cuda::kBlocksOfWarp;
  double hyper[kMaxHyper];
  read_hyper(plan.inputs[e.group], hyper);
  for (int64_t b = first + lane_id(); b < first + cuda::kBlocksOfWarp && b * size < e.numel;
       b += kWarp) {
    double sum = 0.0;
    for (int64_t r = b * each; r < (b + 1) * each && r < runs && kind != Sum::none; ++r)
      sum += partial[r];
    const int64_t left = e.numel - b * size;
    const double told = kind == Sum::squares ? std::sqrt(sum)
                                             : sum / static_cast<double>(left < size ? left : size);
    with_rule(Rules{}, e.rule, [&](auto rule) {
      using Rule = decltype(rule);
      if constexpr (Rule::kScales > 0) {
        if (static_cast<DType>(e.dtype[0]) == DType::f64)
          keep_scale<Rule>(hyper, work.stage, told, scales_of<double>(plan, e) + kMostScales * b);
        else
          keep_scale<Rule>(hyper, work.stage, told, scales_of<float>(plan, e) + kMostScales * b);
      }
    });
  }
}

PYSMOOTH_KERNELS_END

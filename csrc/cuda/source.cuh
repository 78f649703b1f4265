// source, on CUDA: the passes of a rule before apply. A pass evaluates the rule's source, keeps
// what it changes, and sums its values up; the last block turns the sums into what the rule is
// told.
#pragma once

#include "cuda/apply.cuh"
#include "cuda/passes.cuh"
#include "cuda/select.cuh"

PYSMOOTH_KERNELS_BEGIN

// A sum of values that are gone once they were added. As the CPU backend's in the ordinary; where
// float overflows, or squares underflow, other sums of scaled values stand in, in the order of
// rows.
template <class A>
struct PassSum {
  using C = typename A::C;
  C lane[A::kGroup] = {};
  C down = C(0), up = C(0);

  static constexpr double kDown = 8.271806125530277e-25;  // 2^-80
  static constexpr double kUp = 1.298074214633707e33;     // 2^110

  PYSMOOTH_DEVICE void add(Sum kind, int place, C x) {
    const C term = kind == Sum::squares ? x * x : absolute(x);
    change_at(lane, place, [term](C held) { return held + term; });
    if (kind == Sum::squares) {
      if constexpr (sizeof(C) == 4) {
        const C low = x * static_cast<C>(kDown), high = x * static_cast<C>(kUp);
        down += low * low;
        up += high * high;
      }
    } else {
      if constexpr (sizeof(C) == 4) down += absolute(x) * static_cast<C>(kDown);
    }
  }
  PYSMOOTH_DEVICE double total(Sum kind, int head, double* lanes) const {
    const double sum = combine_lanes<Reduction::sum_squares>(lane, head, lanes);
    if constexpr (sizeof(C) == 8) return sum;
    const bool squares = kind == Sum::squares;
    const bool over = !(sum <= 3.4028234663852886e38);
    const bool under = squares && sum < 7.8886090522101181e-31;
    if (!__any_sync(kEveryLane, over || under)) return sum;
    C scaled[A::kGroup] = {};
    scaled[0] = under ? up : down;
    const double again = combine_lanes<Reduction::sum_squares>(scaled, head, lanes);
    const double scale = under ? kUp : kDown;
    return !over && !under ? sum : squares ? again / scale / scale : again / scale;
  }
};

// Before anything is marked in this step: the words of the warp's item, `words` of them.
PYSMOOTH_DEVICE void clear_marks(const View& plan, const Item& item, int64_t words) {
  const Entry& e = plan.entries[item.tensor];
  if (e.first_mark < 0) return;
  const int64_t all = (e.numel + 31) / 32, first = item.part * words;
  for (int k = 0; k < kMaxSelections; ++k)
    for (int64_t i = first + lane_id(); i < first + words && i < all; i += kWarp)
      marks_of(plan, e, k)[i] = 0;
}

// `kAbsorbed`: states have gone through pass 0 already (absorb.cuh), and hold its values.
// `kBlocks`: blocks are scaled by themselves (blocks.cuh), and summed up by themselves in every
// pass.
template <class Rule, int kStage, class A, bool kAbsorbed, bool kBlocks>
PYSMOOTH_DEVICE void source_item(const View& plan, const Work& work, const Item& item,
                                 double* lanes) {
  using C = typename A::C;
  using P = Port<Rule, A, std::conditional_t<kAbsorbed, UseAgain<Rule>, UsePass<Rule, kStage>>>;
  using Us = Team<A::kGroup>;
  const Us me;
  if constexpr (Rule::kMarks > 0 && kStage == 0)
    clear_marks(plan, item, int64_t{Us::kTeams} * work.rows * kRow / 32);
  const Prepared& prepared = plan.prepared[item.tensor];
  Constants<Rule, C> constants(prepared);
  constexpr int kKnown = kStage < Rule::kScales ? kStage : Rule::kScales;
  BlockScales<Rule, C, kBlocks && P::kDraws ? kKnown : 0> scales(plan, item.tensor);
  const Sum kind = prepared.sum[kStage];
  // Some rules need the parameter for weight decay only.
  const bool reads_param = has(P::kUse.writes, 0) || prepared.reads_param[kStage];
  Span<Rule, A> span(plan, item.tensor, P::kTouched);
  [[maybe_unused]] const bool collects = prepared.selects && plan.select.kind == Selector::top_k &&
                                         plan.select.scope != SelectScope::block;
  constexpr bool kCollects = kStage < selections_of<Rule>;
  if (P::kUse.writes == 0 && kind == Sum::none && !(kCollects && collects)) return;
  // What apply, or a selection, rounds after this is rounded by other noise.
  const NoiseKey key = prepared.noise.shifted(kNoisePass * (1 + kStage));
  // Hands every value to see(value, place in the thread's group, whether it is one).
  const auto evaluate = [&](auto see) {
    walk<P>(span, constants.take, Drawer<C>(prepared, item.tensor), key, reads_param,
            [&](typename P::Element& x, int row, int j, bool there, int64_t index) {
              if (there) scales.enter(index, &constants.hyper);
              C value;
              if constexpr (kAbsorbed)
                value = Rule::template again<kStage>(x, constants.hyper);
              else
                value = Rule::template source<kStage>(x, constants.hyper);
              if constexpr (Rule::kKeepsValue && kStage == 0 && !kAbsorbed)
                if (P::by_chance(span, 2))
                  value = x.state[0] =
                      widen_bf16<float>(rounded_by_chance(span.entry, 2, x.state[0], index, key));
              if constexpr (kCollects)
                if (collects) collect(plan, span.entry, value, there, index);
              see(value, j, there);
              if constexpr (Rule::kSendsSigns && kStage == 0) {
                const uint32_t bits = __ballot_sync(kEveryLane, !(value >= C(0)));
                if (lane_id() == 0) signs_of<A>(plan, work, row)[j] = bits;
              }
            });
  };
  double* const mine = lanes + me.team * kRow;
  double* const partial = plan.partial + plan.partial_first[item.tensor];
  const int64_t number = static_cast<int64_t>(item.part) * Us::kTeams + me.team;
  // Leaves the sum of the span; `at` is its place.
  const auto sum_up = [&](int64_t at) {
    PassSum<A> sum;
    evaluate([&](C value, int j, bool there) {
      if (kind != Sum::none && there) sum.add(kind, j, value);
    });
    if (kind == Sum::none) return;
    const double total = sum.total(kind, span.head, mine);
    if (me.member == 0 && span.length > 0) partial[at] = total;
  };
  if constexpr (kBlocks) {
    const int run = plan.block_run < kRow ? kRow : plan.block_run;
    const int64_t runs = int64_t{work.rows} * kRow / run;
    const int64_t first = number * work.rows * kRow - me.team * int64_t{work.rows} * kRow;
    for (int k = 0; k < runs && first + k * run < span.entry.numel; ++k) {
      span.take_run(item.part, work.rows, k * run, run);
      if (plan.block_run >= kRow) {
        sum_up(number * runs + k);
        continue;
      }
      RowSums<A> sums;
      evaluate([&](C value, int j, bool there) {
        if (there) sums.add(j, value);
      });
      if (kind == Sum::none) continue;
      const int64_t begin = span.begin / plan.block_run;
      sums.total(kind, span.head, plan.block_run, mine, [&](int b, double sum) {
        if (b * plan.block_run < span.length) partial[begin + b] = sum;
      });
    }
  } else {
    span.take_part(item.part, work.rows);
    sum_up(number);
  }
  if (kind == Sum::none || (kBlocks && plan.stage_scope[kStage] == Scope::block)) return;
  const int run = kBlocks ? plan.block_run : kPassElements;
  const int64_t pieces = (span.entry.numel + kPassElements - 1) / kPassElements;
  const auto items = static_cast<uint32_t>((pieces + Us::kTeams - 1) / Us::kTeams);
  if (last_warp(&plan.arrived[item.tensor], items)) {
    const double all = sum_in_order<Reduction::sum_squares>(
        partial, (span.entry.numel + run - 1) / run, kChunkElements / run, lanes,
        kBlocks ? static_cast<int>(plan.select.block) / run : 1);
    if (lane_id() == 0) plan.value[item.tensor] = all;
  }
}

template <class Rule, int kStage, class A, bool kAbsorbed = false, bool kBlocks = false>
PYSMOOTH_KERNEL source(View plan, Work work) {
  PYSMOOTH_SHARED(Lanes, lanes);
  if (plan.status->skip != 0) return;
  const Item item = item_of(plan, work);
  if (item.tensor >= 0)
    source_item<Rule, kStage, A, kAbsorbed, kBlocks>(plan, work, item, lanes[warp_id()][0]);
  if (kBlocks && plan.stage_scope[kStage] == Scope::block) return;  // scale_blocks comes next
  if (shares_pass(plan, kStage)) return;                            // conclude_pass does
  if (last_block(&plan.arrived[plan.tensors], static_cast<uint32_t>(work.blocks)))
    finish_stage(plan, kStage);
}

PYSMOOTH_KERNELS_END

// select, on CUDA: which coordinates of a unit (a tensor, all tensors, a block) are the k largest,
// to the bit those of the CPU backend (cpu/select.h), and what becomes of them.
//
// A sample of the values suggests a filter; the pass that evaluates them collects what reaches it.
// The rest is a radix selection over the candidates or, where these are too few or too many, over
// all values: the same launches, which find out from the unit what they look at. So nothing depends
// on the host, and no result on the order of candidates, which is that of chance.
#pragma once

#include "cuda/access.cuh"
#include "cuda/finalize.cuh"
#include "cuda/radix.cuh"

PYSMOOTH_KERNELS_BEGIN

using cuda::Candidate;
using cuda::kSampleLine;
using cuda::Unit;

PYSMOOTH_DEVICE bool from_list(const Unit& u) {
  const auto held = static_cast<int64_t>(u.candidates);
  return held <= u.room && (held >= u.k || u.complete != 0);
}
// The list is the selection.
PYSMOOTH_DEVICE bool takes_list(const Unit& u) {
  return from_list(u) && static_cast<int64_t>(u.candidates) <= u.k;
}
PYSMOOTH_DEVICE uint64_t place_of(const Unit& u, int64_t index) {
  return (uint64_t{1} << u.place_bits) - 1 - static_cast<uint64_t>(index);
}
PYSMOOTH_DEVICE bool is_selecting(const View& plan, int t) {
  return is_active(plan, t) && plan.prepared[t].selects;
}

// ---- a rule's values ----------------------------------------------------------------------------

// Single elements of one tensor, through a pass or what selected() touches.
template <class Rule, int kStage, class A, class Use>
struct Elements {
  using C = typename A::C;
  using P = Port<Rule, A, Use>;
  const Prepared& prepared;
  Constants<Rule, C> constants;
  Span<Rule, A> span;
  P port;

  PYSMOOTH_DEVICE Elements(const View& plan, int t)
      : prepared(plan.prepared[t]), constants(prepared), span(plan, t, P::kTouched) {}
  PYSMOOTH_DEVICE typename P::Element load(int64_t i) {
    return port.load_one(span, constants.take, i, true);
  }
  // What the pass will give, or has given.
  PYSMOOTH_DEVICE C before(int64_t i) {
    auto x = load(i);
    return Rule::template source<kStage>(x, constants.hyper);
  }
  PYSMOOTH_DEVICE C again(int64_t i) {
    return Rule::template again<kStage>(load(i), constants.hyper);
  }
  // A chosen one: taken in, or marked.
  PYSMOOTH_DEVICE void take(int64_t i, [[maybe_unused]] C scale) {
    if constexpr (Rule::kMarks > 0) {
      atomicOr(marks_of(span.plan, span.entry, kStage) + i / 32, 1u << i % 32);
    } else {
      auto x = load(i);
      Rule::selected(x, Rule::template again<kStage>(x, constants.hyper) * scale, constants.hyper);
      port.store_one(span, x, i, prepared.noise);
    }
  }
};
template <class Rule, int kStage>
using UseChosen =
    std::conditional_t<(Rule::kMarks > 0), UsePass<Rule, kStage>, UseSelected<Rule, true>>;

// A line of a sample per half warp: item.part counts them in the tensor.
template <class Rule, int kStage, class A>
PYSMOOTH_KERNEL sample(View plan, Work work) {
  if (plan.status->skip != 0) return;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t line = i / kSampleLine;
  if (line >= work.count) return;
  const Item item = work.items[line];
  const Entry& e = plan.entries[item.tensor];
  const Unit& u = plan.units[e.unit];
  const int64_t at = int64_t{item.part} * kSampleLine + i % kSampleLine;
  uint64_t key = 0;
  if (at < e.numel && is_selecting(plan, item.tensor)) {
    using C = typename A::C;
    const auto value = [&]() -> C {
      if constexpr (Rule::kAbsorbs)
        if (plan.absorbs)
          return Elements<Rule, kStage, A, UseAgain<Rule>>(plan, item.tensor).again(at);
      return Elements<Rule, kStage, A, UsePass<Rule, kStage>>(plan, item.tensor).before(at);
    };
    key = key_of(value(), u.wide != 0);
  }
  plan.samples[work.first + i] = key;
}

// A candidate for the unit's list. All lanes of a warp come here together.
template <class C>
PYSMOOTH_DEVICE void collect(const View& plan, const Entry& e, C value, bool there, int64_t index) {
  Unit& u = plan.units[e.unit];
  const uint64_t key = key_of(value, u.wide != 0);
  const bool reaches = there && key >= u.filter;
  const uint32_t who = __ballot_sync(kEveryLane, reaches);
  if (who == 0) return;
  const int leader = __ffs(who) - 1;
  unsigned long long first = 0;
  if (lane_id() == leader)
    first = atomicAdd(&u.candidates, static_cast<unsigned long long>(__popc(who)));
  first = __shfl_sync(kEveryLane, first, leader);
  const int64_t at = static_cast<int64_t>(first) + __popc(who & ((1u << lane_id()) - 1u));
  if (reaches && at < u.room)
    plan.candidates[u.first_candidate + at] = {key, e.select_first + index};
}

// ---- looking at the values, or at the list ------------------------------------------------------

// What one block of a launch looks at: a piece of its tensor, or its share of the unit's list, of
// which there are as many as the tensor has pieces (or the launch, where the unit is all tensors).
struct Share {
  int64_t begin, end;
  PYSMOOTH_DEVICE Share(int64_t count, int64_t number, int64_t of)
      : begin(count / of * number + min64(number, count % of)),
        end(begin + count / of + (number < count % of ? 1 : 0)) {}
  PYSMOOTH_DEVICE static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
};

PYSMOOTH_DEVICE int64_t pieces_of(const Entry& e, const Work& work) {
  return (e.numel + work.piece - 1) / work.piece;
}

// The tensor that an index of the unit belongs to.
PYSMOOTH_DEVICE int tensor_of(const View& plan, const Unit& u, int64_t index) {
  int low = u.first_tensor, high = u.last_tensor;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (plan.entries[middle].select_first <= index)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Calls listed(candidate, tensor) or looked(index in the tensor) for the block's share, one element
// per thread at a time.
template <class Listed, class Looked>
PYSMOOTH_DEVICE void each_in_question(const View& plan, const Work& work, const Item& item,
                                      Listed listed, Looked looked) {
  const Entry& e = plan.entries[item.tensor];
  const Unit& u = plan.units[e.unit];
  if (from_list(u)) {
    const bool global = u.last_tensor - u.first_tensor > 1;
    const int64_t number = global ? int64_t{blockIdx.x} : int64_t{item.part};
    const Share share(static_cast<int64_t>(u.candidates), number,
                      global ? int64_t{work.count} : pieces_of(e, work));
    for (int64_t i = share.begin + threadIdx.x; i < share.end; i += kThreads) {
      const Candidate c = plan.candidates[u.first_candidate + i];
      const int t = tensor_of(plan, u, c.index);
      // Others are for the launches of their own kernels.
      if (plan.entries[t].kernels == e.kernels) listed(c, t);
    }
    return;
  }
  if (!is_selecting(plan, item.tensor)) return;
  const int64_t begin = item.part * work.piece;
  for (int64_t i = begin + threadIdx.x; i < begin + work.piece && i < e.numel; i += kThreads)
    looked(i);
}

// One digit of the unit's threshold; work.stage is its number.
template <class Rule, int kStage, class A>
PYSMOOTH_KERNEL narrow(View plan, Work work) {
  if (plan.status->skip != 0) return;
  PYSMOOTH_SHARED(Histogram, histogram);
  const Item item = work.items[blockIdx.x];
  const Entry& e = plan.entries[item.tensor];
  Unit& u = plan.units[e.unit];
  const bool wide = u.wide != 0;
  if (u.k == 0 || u.threshold.settled != 0 || takes_list(u)) return;
  if (work.stage >= digits_of(wide, u.place_bits)) return;
  for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kThreads) histogram[i] = 0;
  __syncthreads();
  const Digit digit(work.stage, wide, u.place_bits);
  const Threshold threshold = u.threshold;
  const auto see = [&](uint64_t key, int64_t index) {
    const int d = digit.of(threshold, key, place_of(u, index));
    if (d >= 0) atomicAdd(&histogram[d], 1u);
  };
  Elements<Rule, kStage, A, UseAgain<Rule>> elements(plan, item.tensor);
  each_in_question(
      plan, work, item, [&](const Candidate& c, int) { see(c.key, c.index); },
      [&](int64_t i) { see(key_of(elements.again(i), wide), e.select_first + i); });
  __syncthreads();
  auto* const all =
      reinterpret_cast<unsigned long long*>(plan.histogram) + int64_t{e.unit} * kDigits;
  for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kThreads)
    if (histogram[i] != 0) atomicAdd(&all[i], static_cast<unsigned long long>(histogram[i]));
  const bool global = u.last_tensor - u.first_tensor > 1;
  const int64_t blocks = global ? int64_t{work.blocks} : pieces_of(e, work);
  if (u.jointly != 0) return;  // take_digit_of_all comes next
  if (!last_block(&plan.unit_arrived[e.unit], static_cast<uint32_t>(blocks))) return;
  take_digit(&u.threshold, digit, [&](int i) { return uint64_t{all[i]}; });
  for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kThreads) all[i] = 0;
}

// What is chosen is taken in.
template <class Rule, int kStage, class A>
PYSMOOTH_KERNEL selected(View plan, Work work) {
  if (plan.status->skip != 0) return;
  using C = typename A::C;
  using Taken = Elements<Rule, kStage, A, UseChosen<Rule, kStage>>;
  const Item item = work.items[blockIdx.x];
  const Entry& e = plan.entries[item.tensor];
  const Unit& u = plan.units[e.unit];
  if (u.k == 0) return;
  if (plan.select.kind == Selector::rand_k) {
    if (!is_selecting(plan, item.tensor)) return;
    // The first k of a permutation of the tensor's elements.
    Taken mine(plan, item.tensor);
    const Permutation order(static_cast<uint64_t>(e.numel), plan.select.seed, mine.prepared.step,
                            static_cast<uint32_t>(item.tensor));
    const C scale = plan.select.scaled
                        ? static_cast<C>(static_cast<double>(e.numel) / static_cast<double>(u.k))
                        : C(1);
    const Share share(u.k, item.part, pieces_of(e, work));
    for (int64_t j = share.begin + threadIdx.x; j < share.end; j += kThreads)
      mine.take(static_cast<int64_t>(order(static_cast<uint64_t>(j))), scale);
    return;
  }
  const bool all = takes_list(u);
  const auto chosen = [&](uint64_t key, int64_t index) {
    return all || takes(u.threshold, key, place_of(u, index));
  };
  Taken mine(plan, item.tensor);
  each_in_question(
      plan, work, item,
      [&](const Candidate& c, int t) {
        if (chosen(c.key, c.index))
          Taken(plan, t).take(c.index - plan.entries[t].select_first, C(1));
      },
      [&](int64_t i) {
        if (chosen(key_of(mine.again(i), u.wide != 0), e.select_first + i)) mine.take(i, C(1));
      });
}

// The k largest of one block of consecutive elements: item.part is its number.
template <class Rule, int kStage, class A>
PYSMOOTH_KERNEL select_block(View plan, Work work) {
  if (plan.status->skip != 0) return;
  PYSMOOTH_SHARED(Threshold, threshold);
  PYSMOOTH_SHARED(Histogram, histogram);
  using C = typename A::C;
  const Item item = work.items[blockIdx.x];
  if (!is_selecting(plan, item.tensor)) return;
  constexpr bool kIsWide = sizeof(C) == 8;
  Elements<Rule, kStage, A, UseChosen<Rule, kStage>> mine(plan, item.tensor);
  const int64_t begin = item.part * plan.select.block;
  const int64_t left = plan.entries[item.tensor].numel - begin;
  const int64_t n = left < plan.select.block ? left : plan.select.block;
  const int bits = bits_for(n);
  const auto place = [bits](int64_t i) {
    return (uint64_t{1} << bits) - 1 - static_cast<uint64_t>(i);
  };
  const auto key = [&](int64_t i) { return key_of(mine.again(begin + i), kIsWide); };
  find_threshold(&threshold, n, plan.select.chosen_of(n), kIsWide, bits, histogram,
                 [&](int64_t i, auto see) { see(key(i), place(i)); });
  for (int64_t i = threadIdx.x; i < n; i += kThreads)
    if (takes(threshold, key(i), place(i))) mine.take(begin + i, C(1));
}

PYSMOOTH_KERNELS_END

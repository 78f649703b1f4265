// reduce, on CUDA: norms of all gradients in one launch, and what follows from them.
//
// A warp folds as many runs of 8,192 elements as it holds teams, and leaves one number per run. The
// last warp to be done with a tensor adds these up in order; the last block of all makes norms and
// clip coefficients of the sums (finalize.cuh). Sums are the CPU backend's to the bit, but for the
// power sum.
#pragma once

#include "cuda/finalize.cuh"
#include "cuda/fold.cuh"
#include "cuda/layout.cuh"

PYSMOOTH_KERNELS_BEGIN

// A run of one gradient: where its elements are.
template <class T>
struct Run {
  const T* data;
  const Layout* layout;  // null: linear
  int64_t begin;         // of the run
  int64_t length;        // may be 0
  int head;              // elements before a 16-byte boundary

  PYSMOOTH_DEVICE T at(int64_t i) const {
    int64_t offset[1] = {begin + i};
    if (layout != nullptr) offsets_of(*layout, begin + i, offset);
    return data[offset[0]];
  }
};

template <class T>
PYSMOOTH_DEVICE compute_t<T> widen(T x) {
  if constexpr (sizeof(T) >= 4)
    return x;
  else
    return decode16(x.bits, dtype_traits<T>::value);
}

// Element `j` of a 16-byte word of T.
template <class T, int kGroup>
PYSMOOTH_DEVICE compute_t<T> element(const uint4& word, int j) {
  const uint32_t words[4] = {word.x, word.y, word.z, word.w};
  if constexpr (kGroup == 2)
    return bits_as<double>(uint64_t{words[2 * j]} | uint64_t{words[2 * j + 1]} << 32);
  else if constexpr (kGroup == 4)
    return bits_as<float>(words[j]);
  else
    return decode16((words[j / 2] >> 16 * (j % 2)) & 0xffffu, dtype_traits<T>::value);
}

// Calls body(j, x) for every element of the run that is this thread's, in order; j is its place in
// the group. Whole groups come in 16-byte words, several under way at once.
template <class T, class Body>
PYSMOOTH_DEVICE void each_element(const Run<T>& run, Body body) {
  constexpr int kGroup = 16 / static_cast<int>(sizeof(T)), kAhead = 8;
  const Team<kGroup> me;
  const int first = run.head + kGroup * me.member;  // in a row
  const auto some = [&](int64_t at) {
    PYSMOOTH_ROLLED
    for (int j = 0; j < kGroup; ++j)
      if (at + j >= 0 && at + j < run.length) body(j, widen(run.at(at + j)));
  };
  const T* const data = run.data + run.begin;
  int64_t at = run.head > 0 ? first - kRow : first;
  while (at < run.length) {
    if (run.layout == nullptr && at >= 0 && at + (kAhead - 1) * kRow + kGroup <= run.length) {
      uint4 word[kAhead];
      PYSMOOTH_UNROLL
      for (int r = 0; r < kAhead; ++r)
        word[r] = *reinterpret_cast<const uint4*>(data + at + r * kRow);
      PYSMOOTH_UNROLL
      for (int r = 0; r < kAhead; ++r) {
        PYSMOOTH_UNROLL
        for (int j = 0; j < kGroup; ++j) body(j, element<T, kGroup>(word[r], j));
      }
      at += kAhead * kRow;
    } else {
      some(at);
      at += kRow;
    }
  }
}

template <Reduction kind, class C, class T>
PYSMOOTH_DEVICE double fold_run(const Run<T>& run, double* lanes) {
  constexpr int kGroup = 16 / static_cast<int>(sizeof(T));
  C acc[kGroup];
  PYSMOOTH_UNROLL
  for (int j = 0; j < kGroup; ++j) acc[j] = static_cast<C>(neutral<kind>());
  each_element(run, [&](int place, compute_t<T> x) {
    change_at(acc, place, [x](C held) { return fold_in<kind, C>(held, x); });
  });
  return combine_lanes<kind>(acc, run.head, lanes);
}

// Again in double, row by row, for a sum that float cannot be trusted with. All threads of the warp
// come here; those whose team has no need throw the result away.
template <Reduction kind, class T>
__device__ double fold_wide(const Run<T>& run, double* lanes) {
  constexpr int kGroup = 16 / static_cast<int>(sizeof(T));
  const Team<kGroup> me;
  double total = 0.0;
  for (int64_t row = 0; row < kFoldElements; row += kRow) {
    PYSMOOTH_ROLLED
    for (int i = me.member; i < kRow; i += Team<kGroup>::kMembers)
      lanes[i] = row + i < run.length
                     ? fold_in<kind, double>(0.0, static_cast<double>(widen(run.at(row + i))))
                     : 0.0;
    total += tree<kind, kGroup>(lanes);
  }
  return total;
}

template <class T>
__device__ double power_sum(const Run<T>& run, double power, double* lanes) {
  constexpr int kGroup = 16 / static_cast<int>(sizeof(T));
  double acc[kGroup];
  PYSMOOTH_UNROLL
  for (int j = 0; j < kGroup; ++j) acc[j] = 0.0;
  each_element(run, [&](int place, compute_t<T> x) {
    const double term = std::pow(std::fabs(static_cast<double>(x)), power);
    change_at(acc, place, [term](double held) { return held + term; });
  });
  return combine_lanes<Reduction::sum_power>(acc, run.head, lanes);
}

constexpr double kLargestDouble = 1.7976931348623157e308;

template <class T>
PYSMOOTH_DEVICE bool has_nonfinite(const Run<T>& run, double* lanes) {
  return !(fold_run<Reduction::max_abs, compute_t<T>>(run, lanes) <= kLargestDouble);
}

// The number of one run, as every member of its team gets it.
template <Reduction kind, class T>
PYSMOOTH_DEVICE double reduce_run(const Run<T>& run, double power, double* lanes, bool* nonfinite) {
  using C = compute_t<T>;
  if constexpr (kind == Reduction::sum_squares || kind == Reduction::sum_abs) {
    constexpr double kTrusted = kind == Reduction::sum_squares ? 7.8886090522101181e-31 : 0.0;
    double sum = fold_run<kind, C>(run, lanes);
    const bool doubtful = !(sum >= kTrusted && sum <= 3.4028234663852886e38);
    if (__any_sync(kEveryLane, doubtful)) {
      const double top = fold_run<Reduction::max_abs, C>(run, lanes);
      if (doubtful) *nonfinite = !(top <= kLargestDouble);
      const bool again = doubtful && sizeof(C) == 4 && top != 0.0;
      if (__any_sync(kEveryLane, again)) {
        const double wide = fold_wide<kind>(run, lanes);
        if (again) sum = wide;
      }
    }
    return sum;
  } else if constexpr (kind == Reduction::sum_power) {
    *nonfinite = has_nonfinite(run, lanes);
    return power_sum(run, power, lanes);
  } else {
    const double out = fold_run<kind, C>(run, lanes);
    *nonfinite = kind == Reduction::max_abs ? !(out <= kLargestDouble) : has_nonfinite(run, lanes);
    return out;
  }
}

// Run `number` of a tensor's gradient, of so many elements: a multiple of what 16 bytes hold.
template <class T>
PYSMOOTH_DEVICE Run<T> run_of(const View& plan, const Entry& e, const void* grad, int64_t number,
                              int elements) {
  constexpr int kGroup = 16 / static_cast<int>(sizeof(T));
  const int64_t left = e.numel - number * elements;
  Run<T> run;
  run.data = static_cast<const T*>(grad);
  run.layout = e.grad_layout < 0 ? nullptr : plan.layouts + e.grad_layout;
  run.begin = number * elements;
  run.length = left < 0 ? 0 : left < elements ? left : elements;
  const auto misplaced = static_cast<int>(reinterpret_cast<uintptr_t>(grad) % 16 / sizeof(T));
  run.head = run.layout != nullptr || misplaced == 0 ? 0 : kGroup - misplaced;
  return run;
}

// One warp's share of a tensor.
template <Reduction kind, class T>
__device__ void reduce_item(const View& plan, const Item& item, const void* grad, double* lanes) {
  constexpr int kGroup = 16 / static_cast<int>(sizeof(T));
  using Us = Team<kGroup>;
  const Us me;
  const Entry& e = plan.entries[item.tensor];
  const int64_t number = static_cast<int64_t>(item.part) * Us::kTeams + me.team;  // of the run
  const Run<T> run = run_of<T>(plan, e, grad, number, kFoldElements);
  bool nonfinite = false;
  const double value = reduce_run<kind>(run, plan.norm_type, lanes + me.team * kRow, &nonfinite);
  if (me.member == 0 && run.length > 0) {
    plan.partial[plan.partial_first[item.tensor] + number] = value;
    if (nonfinite) atomicOr(&plan.nonfinite[item.tensor], 1u);
  }
  const int64_t runs = (e.numel + kFoldElements - 1) / kFoldElements;
  const auto items = static_cast<uint32_t>((runs + Us::kTeams - 1) / Us::kTeams);
  if (last_warp(&plan.arrived[item.tensor], items)) {
    const double sum = sum_in_order<kind>(plan.partial + plan.partial_first[item.tensor], runs,
                                          kChunkElements / kFoldElements, lanes);
    if (lane_id() == 0) plan.value[item.tensor] = sum;
  }
}

// The same, however the gradient is stored.
template <Reduction kind>
PYSMOOTH_DEVICE void reduce_any(const View& plan, const Item& item, double* lanes) {
  if (item.tensor < 0) return;
  const void* const grad = plan.grads[item.tensor];
  switch (static_cast<DType>(plan.entries[item.tensor].dtype[1])) {
    case DType::f32:
      reduce_item<kind, float>(plan, item, grad, lanes);
      break;
    case DType::f64:
      reduce_item<kind, double>(plan, item, grad, lanes);
      break;
    case DType::bf16:
      reduce_item<kind, bf16>(plan, item, grad, lanes);
      break;
    case DType::f16:
      reduce_item<kind, f16>(plan, item, grad, lanes);
      break;
  }
}

template <Reduction kind>
PYSMOOTH_KERNEL reduce(View plan, Work work) {
  PYSMOOTH_SHARED(Lanes, lanes);
  reduce_any<kind>(plan, item_of(plan, work), lanes[warp_id()][0]);
  // What concludes comes when all devices, or processes, are done.
  if (plan.board != nullptr || plan.parts != nullptr) return;
  if (last_block(&plan.arrived[plan.tensors], static_cast<uint32_t>(work.blocks)))
    finalize<kind>(plan);
}

PYSMOOTH_KERNELS_END

// source, on CPU: the passes of a rule before apply. A pass evaluates the rule's source over a
// chunk, keeps what it changes, sums its values up and collects the large ones as candidates of a
// selection. Coordinates that were selected come back one by one.

#include <cstring>

#include "core/rules.h"
#include "cpu/fold.h"
#include "cpu/port.h"

PYSMOOTH_KERNELS_BEGIN

// A filter as the values' type has it: never 0, so that zeros are no candidates.
template <class C>
PYSMOOTH_HD C least_of(double filter) {
  constexpr C kTiny = sizeof(C) == 4 ? static_cast<C>(1.40129846432481707e-45)
                                     : static_cast<C>(4.9406564584124654e-324);
  const C least = static_cast<C>(filter);
  return least < kTiny ? kTiny : least;
}

// Appends to `out` those of n values that reach the filter; `first` is the index of the first one.
// Nobody can predict where they are: vectors leave bits behind, without a branch, which are then
// looked through.
template <class C>
PYSMOOTH_HD Candidate* collect(const C* values, int n, double filter, int64_t first,
                               Candidate* out) {
  constexpr int W = lanes_of<C>;
  const vec<C> least = vec<C>{} + least_of<C>(filter);
  uint64_t words[kBlockElements / 64];
  const auto bits_at = [&](int i) {
    return uint64_t{mask_bits(magnitude<C>(vector_io<C>::load(values + i)) >= least)};
  };
  int i = 0;
  for (; i + 64 <= n; i += 64) {
    uint64_t word = 0;
#pragma GCC unroll 32
    for (int j = 0; j < 64; j += W) word |= bits_at(i + j) << j;
    words[i / 64] = word;
  }
  if (i < n) words[i / 64] = 0;
  for (int j = 0; i + j < n; j += W) words[i / 64] |= bits_at(i + j) << j;
  if (n % 64 != 0) words[n / 64] &= (uint64_t{1} << n % 64) - 1u;
  for (i = 0; i < n; i += 64)
    for (uint64_t bits = words[i / 64]; bits != 0; bits &= bits - 1) {
      const int at = i + __builtin_ctzll(bits);
      *out++ = {static_cast<double>(values[at]), static_cast<uint32_t>(first + at)};
    }
  return out;
}

// What becomes of a block of values: the same code for all rules, and not inlined into them.
template <class C>
__attribute__((noinline)) void digest(const C* values, int count, const SourceTask& task,
                                      int64_t first, SourceResult* result) {
  if (task.sum == Sum::squares)
    result->sum += reduce_block<Reduction::sum_squares>(values, count, 2.0).value;
  else if (task.sum == Sum::abs)
    result->sum += reduce_block<Reduction::sum_abs>(values, count, 1.0).value;
  if (task.filter >= 0.0)
    result->candidates =
        collect(values, count, task.filter, first, task.out + result->candidates) - task.out;
}

// The whole blocks of a chunk whose states are bfloat16; returns how many elements that were.
template <class Rule, int kStage>
int64_t source_low(const ApplyArgs& a, const SourceTask& task, bool reads_param,
                   SourceResult* result) {
  using Use = UsePass<Rule, kStage>;
  static_assert(!Use::kStreams.draws, "nothing is drawn here");
  if (!LowPort<Rule>::fits(a)) return 0;
  const auto h = Rule::template prepare<float>(a.hyper, a.scalars);
  LowPort<Rule> port(a);
  alignas(64) float values[kBlockElements];
  int64_t done = 0;
  for (; done + kBlockElements <= a.length; done += kBlockElements) {
    for (int i = 0; i < kBlockElements; i += kFloats) {
      auto x = port.template load<Use>(done + i, reads_param);
      auto value = Rule::template source<kStage>(x, h);
      port.template store<Use>(&x, done + i);
      if (Rule::kKeepsValue) value = x.state[0];
      vector_io<float>::store(values + i, value);
    }
    if constexpr (Rule::kSendsSigns)
      if (a.signs != nullptr) store_signs(values, kBlockElements, a.signs + done / 64);
    digest(values, kBlockElements, task, done, result);
  }
  return done;
}

// `kAgain`: the values of a pass 0 that states have gone through.
template <class Rule, int kStage, bool kAgain, class C>
SourceResult source(const ApplyArgs& args, const SourceTask& task) {
  using Use = std::conditional_t<kAgain, UseAgain<Rule>, UsePass<Rule, kStage>>;
  const auto h = Rule::template prepare<C>(args.hyper, args.scalars);
  constexpr Touch kUse = touch_of<Rule>(Use::kStreams);
  // Some rules need the parameter for weight decay only.
  const bool reads_param = task.reads_param || (kUse.writes & 1u) != 0;
  SourceResult result;
  int64_t done = 0;
  ApplyArgs a = args;
  if constexpr (Rule::kLowStates != 0 && kStage == 0 && !kAgain && sizeof(C) == 4) {
    if (a.stochastic != 0) done = source_low<Rule, kStage>(a, task, reads_param, &result);
    a.begin += done;
    a.length -= done;
  }
  Drawing<C, Use::kStreams.draws> drawing(a, Rule::draw(a.hyper));
  Staging<C> run(a, {reads_param ? kUse.reads : kUse.reads & ~1u, kUse.writes},
                 drawing.most(kBlockElements));
  alignas(64) C values[kBlockElements];
  int filled = 0;
  while (run.next()) {
    const Port<Rule, C> port(run.operand, a.scalars, drawing.next(run.count));
    C* const out = values + filled;
    for (int64_t i = 0; i < run.count; i += lanes_of<C>) {
      auto x = port.template load<Use>(i, reads_param);
      if constexpr (kAgain)
        vector_io<C>::store(out + i, Rule::template again<kStage>(x, h));
      else
        vector_io<C>::store(out + i, Rule::template source<kStage>(x, h));
      port.template store<Use>(x, i);
    }
    run.commit();
    if constexpr (Rule::kKeepsValue && kStage == 0)
      if (has(a.stochastic, 2)) {
        run.reread(2);
        std::memcpy(out, run.operand[2], static_cast<size_t>(run.count) * sizeof(C));
      }
    filled += static_cast<int>(run.count);
    if (filled < kBlockElements && done + filled < args.length) continue;
    if constexpr (Rule::kSendsSigns && kStage == 0)
      if (a.signs != nullptr) store_signs(values, filled, a.signs + done / 64);
    digest(values, filled, task, done, &result);
    done += filled;
    filled = 0;
  }
  return result;
}

// For samples, where time counts, and for second looks.
template <class Rule, bool kAgain, class C>
void read_values(const ApplyArgs& a, double* out) {
  using Use = std::conditional_t<kAgain, UseAgain<Rule>, UsePass<Rule, 0>>;
  const auto h = Rule::template prepare<C>(a.hyper, a.scalars);
  Staging<C> run(a, {touch_of<Rule>(Use::kStreams).reads, 0u}, kBlockElements);
  while (run.next()) {
    const Port<Rule, C> port(run.operand, a.scalars);
    for (int64_t i = 0; i < run.count; i += lanes_of<C>) {
      auto x = port.template load<Use>(i);
      alignas(64) C row[lanes_of<C>];
      if constexpr (kAgain)
        vector_io<C>::store(row, Rule::template again<0>(x, h));
      else
        vector_io<C>::store(row, Rule::template source<0>(x, h));
      const int64_t n = run.count - i < lanes_of<C> ? run.count - i : lanes_of<C>;
      for (int64_t j = 0; j < n; ++j) *out++ = static_cast<double>(row[j]);
    }
  }
}

template <class Rule, class C>
void values(const ApplyArgs& a, bool again, double* out) {
  again ? read_values<Rule, true, C>(a, out) : read_values<Rule, false, C>(a, out);
}

template <class Rule, class C>
void selected(const ApplyArgs& a, const SelectedTask& task) {
  using Use = UseSelected<Rule>;
  const auto h = Rule::template prepare<C>(a.hyper, a.scalars);
  constexpr Touch kUse = touch_of<Rule>(Use::kStreams);
  Gathering<C> some(a, kUse);
  const Port<Rule, C> port(some.operand, a.scalars);
  alignas(64) C given[Gathering<C>::kMost] = {};
  for (int64_t done = 0; done < task.count; done += Gathering<C>::kMost) {
    const int64_t left = task.count - done;
    const int n = left < Gathering<C>::kMost ? static_cast<int>(left) : Gathering<C>::kMost;
    some.read(task.chosen + done, n);
    for (int j = 0; j < n; ++j) given[j] = static_cast<C>(task.chosen[done + j].value);
    for (int j = 0; j < n; j += lanes_of<C>) {
      auto x = port.template load<Use>(j);
      vec<C> c = vector_io<C>::load(given + j);
      if (task.fetch) c = Rule::template again<0>(x, h) * static_cast<C>(task.scale);
      Rule::selected(x, c, h);
      port.template store<Use>(x, j);
    }
    some.write_back(n);
  }
}

template <class Rule, class C>
void fill(SourceInfo* info, Compute c) {
  if constexpr (Rule::kStages > 0) info->source[0][c] = source<Rule, 0, false, C>;
  if constexpr (Rule::kStages > 1) info->source[1][c] = source<Rule, 1, false, C>;
  if constexpr (Rule::kAbsorbs) info->absorbed[c] = source<Rule, 0, true, C>;
  if constexpr (Rule::kSelects) {
    info->values[c] = values<Rule, C>;
    info->selected[c] = selected<Rule, C>;
  }
}

template <class Rule>
SourceInfo describe_source() {
  SourceInfo info{};
  fill<Rule, float>(&info, kFloat);
  fill<Rule, double>(&info, kDouble);
  return info;
}

template <class... R>
const SourceInfo* describe_sources(RuleList<R...>) {
  static const SourceInfo infos[] = {describe_source<R>()...};
  return infos;
}

KernelTable source_table() {
  KernelTable table{};
  table.sources = describe_sources(Rules{});
  return table;
}

PYSMOOTH_KERNELS_END

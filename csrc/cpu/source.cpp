// source, on CPU: the passes of a rule before apply. A pass evaluates the rule's source over a
// chunk, keeps what it changes, and sums its values up or keeps the large ones as candidates of a
// selection. Coordinates that were selected come back one by one.

#include <cstring>

#include "core/rules.h"
#include "cpu/fold.h"
#include "cpu/port.h"
#include "cpu/sieve.h"

PYSMOOTH_KERNELS_BEGIN

// Sums up a block of values: the same code for all rules, and not inlined into them.
template <class C>
__attribute__((noinline)) double sum_up(const C* values, int count, Sum sum) {
  if (sum == Sum::squares) return reduce_block<Reduction::sum_squares>(values, count, 2.0).value;
  if (sum == Sum::abs) return reduce_block<Reduction::sum_abs>(values, count, 1.0).value;
  return 0.0;
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
      if (a.bits[0] != nullptr) store_signs(values, kBlockElements, a.bits[0] + done / 64);
    result->sum += sum_up(values, kBlockElements, task.sum);
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
      if constexpr (Use::kStreams.marks != 0) load_marks<Use, C>(a, done + filled + i, &x);
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
      if (a.bits[0] != nullptr) store_signs(values, filled, a.bits[0] + done / 64);
    result.sum += sum_up(values, filled, task.sum);
    done += filled;
    filled = 0;
  }
  return result;
}

// Which values of a pass a filter sees: none, those that come out of the rule, or what the rule's
// state holds of them once it is rounded.
enum class Sieved { none, values, stored };

// A pass whose values are selected from, and not summed up.
template <class Rule, int kStage, class C, Sieved kSieved, bool kAgain>
SourceResult filtered(const ApplyArgs& args, const SourceTask& task) {
  using Use = std::conditional_t<kAgain, UseAgain<Rule>, UsePass<Rule, kStage>>;
  static_assert(!Use::kStreams.draws, "nothing is drawn for a pass that is selected from");
  constexpr int W = lanes_of<C>;
  const auto h = Rule::template prepare<C>(args.hyper, args.scalars);
  constexpr Touch kUse = touch_of<Rule>(Use::kStreams);
  const bool reads_param = task.reads_param || (kUse.writes & 1u) != 0;
  Sieve<C> sieve{static_cast<C*>(task.room.values), task.room.index};
  const vec<C> least = vec<C>{} + least_of<C>(task.filter);
  Places<C> place = places_from<C>(0);
  ApplyArgs a = args;
  // bfloat16 states that lie in memory as they should are rounded in registers.
  if constexpr (Rule::kLowStates != 0 && !kAgain && sizeof(C) == 4) {
    if (a.stochastic != 0 && LowPort<Rule>::fits(a)) {
      LowPort<Rule> port(a);
      int64_t done = 0;
      for (; done + W <= a.length; done += W, place += static_cast<uint32_t>(W)) {
        auto x = port.template load<Use>(done, reads_param);
        vec<C> value = Rule::template source<kStage>(x, h);
        port.template store<Use>(&x, done);
        if constexpr (kSieved == Sieved::stored) value = x.state[0];
        if constexpr (kSieved != Sieved::none)
          sieve.take(value, place, reach_bits<C>(value, least));
      }
      a.begin += done;
      a.length -= done;
    }
  }
  Staging<C> run(a, {reads_param ? kUse.reads : kUse.reads & ~1u, kUse.writes},
                 Staging<C>::kNoLimit);
  while (run.next()) {
    const Port<Rule, C> port(run.operand, a.scalars);
    const int64_t count = run.count;  // known not to change
    const auto pass = [&](int64_t i, unsigned lanes) {
      auto x = port.template load<Use>(i, reads_param);
      vec<C> value;
      if constexpr (kAgain)
        value = Rule::template again<kStage>(x, h);
      else
        value = Rule::template source<kStage>(x, h);
      port.template store<Use>(x, i);
      if constexpr (kSieved == Sieved::values)
        sieve.take(value, place, reach_bits<C>(value, least) & lanes);
    };
    const auto look = [&](int64_t i, unsigned lanes) {
      const vec<C> value = vector_io<C>::load(run.operand[2] + i);
      sieve.take(value, place, reach_bits<C>(value, least) & lanes);
    };
    const auto each = [&](auto body) {
      int64_t i = 0;
      for (; i + W <= count; i += W, place += static_cast<uint32_t>(W)) body(i, ~0u);
      if (i == count) return;
      body(i, (1u << (count - i)) - 1u);
      place += static_cast<uint32_t>(count - i);
    };
    const Places<C> first = place;
    each(pass);
    run.commit();
    if constexpr (kSieved == Sieved::stored) {
      run.reread(2);
      place = first;
      each(look);
    }
  }
  return {0.0, sieve.count};
}

template <class Rule, int kStage, class C>
SourceResult select_source(const ApplyArgs& a, const SourceTask& task) {
  if (task.filter < 0.0) {
    // What can be selected from may be summed up instead.
    if constexpr (Rule::kMarks > 0)
      return source<Rule, kStage, false, C>(a, task);
    else
      return filtered<Rule, kStage, C, Sieved::none, false>(a, task);
  }
  if constexpr (Rule::kKeepsValue)
    if (has(a.stochastic, 2)) return filtered<Rule, kStage, C, Sieved::stored, false>(a, task);
  return filtered<Rule, kStage, C, Sieved::values, false>(a, task);
}

// The same where states have taken in the gradient already: what they hold is what is stored.
template <class Rule, class C>
SourceResult select_absorbed(const ApplyArgs& a, const SourceTask& task) {
  if (task.filter < 0.0) return {};
  return filtered<Rule, 0, C, Sieved::values, true>(a, task);
}

// For samples, where time counts, and for second looks.
template <class Rule, int kStage, bool kAgain, class C>
void read_values(const ApplyArgs& args, const Stretch* stretches, int64_t count, double* out) {
  using Use = std::conditional_t<kAgain, UseAgain<Rule>, UsePass<Rule, kStage>>;
  const auto h = Rule::template prepare<C>(args.hyper, args.scalars);
  const Touch touch{touch_of<Rule>(Use::kStreams).reads, 0u};
  ApplyArgs a = args;
  // Each stretch costs a miss per stream: have several under way.
  constexpr int64_t kAhead = 12;
  for (int64_t s = -kAhead; s < count; ++s) {
    if (s + kAhead < count) prefetch_at(a, touch, stretches[s + kAhead].begin);
    if (s < 0) continue;
    a.begin = stretches[s].begin;
    a.length = stretches[s].length;
    Staging<C> run(a, touch, kBlockElements);
    while (run.next()) {
      const Port<Rule, C> port(run.operand, a.scalars);
      for (int64_t i = 0; i < run.count; i += lanes_of<C>) {
        auto x = port.template load<Use>(i);
        alignas(64) C row[lanes_of<C>];
        if constexpr (kAgain)
          vector_io<C>::store(row, Rule::template again<kStage>(x, h));
        else
          vector_io<C>::store(row, Rule::template source<kStage>(x, h));
        const int64_t n = run.count - i < lanes_of<C> ? run.count - i : lanes_of<C>;
        for (int64_t j = 0; j < n; ++j) *out++ = static_cast<double>(row[j]);
      }
    }
  }
}

template <class Rule, int kStage, class C>
void values(const ApplyArgs& a, const Stretch* stretches, int64_t count, bool again, double* out) {
  again ? read_values<Rule, kStage, true, C>(a, stretches, count, out)
        : read_values<Rule, kStage, false, C>(a, stretches, count, out);
}

template <class Rule, class C, bool kFetch>
void take_in(const ApplyArgs& a, const SelectedTask& task, int64_t count) {
  using Use = UseSelected<Rule, kFetch>;
  constexpr int64_t kMost = Gathering<C>::kMost;
  const auto h = Rule::template prepare<C>(a.hyper, a.scalars);
  C* const values = static_cast<C*>(task.picks.values);
  const uint32_t* const index = task.picks.index;
  Gathering<C> some(a, touch_of<Rule>(Use::kStreams));
  const Port<Rule, C> port(some.operand, a.scalars);
  some.prefetch(index, static_cast<int>(count < kMost ? count : kMost));
  for (int64_t done = 0; done < count; done += kMost) {
    const int64_t left = count - done;
    const int n = static_cast<int>(left < kMost ? left : kMost);
    some.prefetch(index + done + n, static_cast<int>(left - n < kMost ? left - n : kMost));
    some.read(index + done, n);
    for (int j = 0; j < n; j += lanes_of<C>) {
      auto x = port.template load<Use>(j);
      vec<C> c;
      if constexpr (kFetch)
        c = Rule::template again<0>(x, h) * static_cast<C>(task.scale);
      else
        c = vector_io<C>::load(values + done + j);
      Rule::selected(x, c, h);
      port.template store<Use>(x, j);
    }
    some.write_back(n);
  }
}

// The picks that stay: all of them, or those that reach the threshold, moved to the front.
template <class C>
int64_t chosen_of(const SelectedTask& task) {
  if (task.fetch || !(task.threshold > 0.0)) return task.picks.count;
  return sift(static_cast<C*>(task.picks.values), task.picks.index, task.picks.count,
              least_of<C>(task.threshold));
}

template <class Rule, class C>
void selected(const ApplyArgs& a, const SelectedTask& task) {
  const int64_t count = chosen_of<C>(task);
  if (task.fetch)
    take_in<Rule, C, true>(a, task, count);
  else
    take_in<Rule, C, false>(a, task, count);
}

template <class C>
void mark(const ApplyArgs& a, const SelectedTask& task) {
  const int64_t count = chosen_of<C>(task);
  std::memset(task.marks, 0, static_cast<size_t>((a.length + 63) / 64) * sizeof(uint64_t));
  for (int64_t j = 0; j < count; ++j)
    task.marks[task.picks.index[j] / 64] |= uint64_t{1} << task.picks.index[j] % 64;
}

template <class Rule, class C, int kStage = 0>
void fill(SourceInfo* info, Compute c) {
  if constexpr (kStage < selections_of<Rule>) {
    info->source[kStage][c] = select_source<Rule, kStage, C>;
    info->values[kStage][c] = values<Rule, kStage, C>;
    fill<Rule, C, kStage + 1>(info, c);
  } else if constexpr (kStage < Rule::kStages) {
    info->source[kStage][c] = source<Rule, kStage, false, C>;
    fill<Rule, C, kStage + 1>(info, c);
  } else {
    if constexpr (Rule::kSelects && Rule::kAbsorbs)
      info->absorbed[c] = select_absorbed<Rule, C>;
    else if constexpr (Rule::kAbsorbs)
      info->absorbed[c] = source<Rule, 0, true, C>;
    if constexpr (Rule::kSelects)
      info->selected[c] = selected<Rule, C>;
    else if constexpr (Rule::kMarks > 0)
      info->selected[c] = mark<C>;
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

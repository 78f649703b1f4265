// source, on CPU: the passes of a rule before apply. A pass evaluates the rule's source over a
// chunk, keeps what it changes, sums its values up and collects the large ones as candidates of a
// selection.
//
// Values go through a block in L1, which is then folded and filtered. Coordinates that were
// selected come back one by one.

#include <type_traits>

#include "core/rules.h"
#include "cpu/fold.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"
#include "cpu/walk.h"

PYSMOOTH_KERNELS_BEGIN

constexpr int kSourceBlock = 2048;

// Loads and stores the streams that a pass touches, of one element or of a vector of them.
template <class Rule, class P, class G>
struct Port {
  using C = compute_t<P>;
  using Vector = Lane<vec<C>, Rule::kStates>;
  using Scalar = Lane<C, Rule::kStates>;
  static constexpr int kStates = Rule::kStates;

  const ApplyArgs& a;
  const GradientIn<C> take;

  explicit Port(const ApplyArgs& args) : a(args), take(args.scalars) {}

  PYSMOOTH_HD P* param(int64_t i) const { return static_cast<P*>(a.param) + i; }
  PYSMOOTH_HD const G* grad(int64_t i) const { return static_cast<const G*>(a.grad) + i; }
  PYSMOOTH_HD C* state(int k, int64_t i) const { return static_cast<C*>(a.state[k]) + i; }

  template <class Use>
  PYSMOOTH_HD Vector load(const int64_t* at, int64_t i) const {
    using io = vector_io<C>;
    Vector x{};
    if constexpr (Use::kStreams.reads_param) x.param = io::load(param(at[0] + i));
    if constexpr (Use::kStreams.reads_grad) x.grad = take(io::load(grad(at[1] + i)));
    for (int k = 0; k < kStates; ++k)
      if (Use::kStreams.reads_state >> k & 1u) x.state[k] = io::load(state(k, at[2 + k] + i));
    return x;
  }
  template <class Use>
  PYSMOOTH_HD void store(const Vector& x, const int64_t* at, int64_t i) const {
    using io = vector_io<C>;
    if constexpr (Use::kStreams.writes_param) io::store(param(at[0] + i), x.param);
    for (int k = 0; k < kStates; ++k)
      if (Use::kStreams.writes_state >> k & 1u) io::store(state(k, at[2 + k] + i), x.state[k]);
  }
  // at[k] is where operand k's element lies.
  template <class Use>
  PYSMOOTH_HD Scalar load1_at(const int64_t* at) const {
    Scalar x{};
    if constexpr (Use::kStreams.reads_param) x.param = load1<C>(param(at[0]));
    if constexpr (Use::kStreams.reads_grad) x.grad = take(load1<C>(grad(at[1])));
    for (int k = 0; k < kStates; ++k)
      if (Use::kStreams.reads_state >> k & 1u) x.state[k] = *state(k, at[2 + k]);
    return x;
  }
  template <class Use>
  PYSMOOTH_HD void store1_at(const Scalar& x, const int64_t* at) const {
    if constexpr (Use::kStreams.writes_param) store1(param(at[0]), x.param);
    for (int k = 0; k < kStates; ++k)
      if (Use::kStreams.writes_state >> k & 1u) *state(k, at[2 + k]) = x.state[k];
  }
};

// Where element `index` of a tensor lies in every operand.
PYSMOOTH_HD void locate(const ApplyArgs& a, int64_t index, int64_t* at) {
  if (a.layout == nullptr) {
    for (int k = 0; k < kMaxOperands; ++k) at[k] = index;
    return;
  }
  const Layout& layout = *a.layout;
  for (int k = 0; k < kMaxOperands; ++k) at[k] = 0;
  for (int d = layout.ndim - 1; d >= 0; --d) {
    const int64_t step = index % layout.size[d];
    index /= layout.size[d];
    for (int k = 0; k < layout.operands; ++k) at[k] += step * layout.stride[k][d];
  }
}

// What a pass touches, with or without the parameter, which some rules need for weight decay only.
template <class Rule, int kStage, bool kParam>
struct UsePass {
  static constexpr Streams kOf = Rule::kPass[kStage];
  static constexpr Streams kStreams{kOf.reads_param && kParam, kOf.writes_param, kOf.reads_grad,
                                    kOf.reads_state, kOf.writes_state};
};
template <class Rule>
struct UseSelected {
  static constexpr Streams kStreams = Rule::kSelected;
};

// Calls block(values, count) for every kSourceBlock values of the chunk, in order; the values come
// from element(x) and element is also handed vectors.
template <class Use, class Rule, class P, class G, class Element, class Block>
PYSMOOTH_HD void each_block(const ApplyArgs& a, Element element, Block block) {
  using C = compute_t<P>;
  constexpr int W = lanes_of<C>;
  const Port<Rule, P, G> port(a);
  alignas(64) C values[kSourceBlock];
  if (a.layout == nullptr) {
    int64_t at[kMaxOperands];
    for (int64_t done = 0; done < a.length; done += kSourceBlock) {
      const int count =
          static_cast<int>(a.length - done < kSourceBlock ? a.length - done : kSourceBlock);
      for (int64_t& offset : at) offset = a.begin + done;
      int i = 0;
      for (; i + W <= count; i += W) {
        auto x = port.template load<Use>(at, i);
        vector_io<C>::store(values + i, element(x));
        port.template store<Use>(x, at, i);
      }
      for (; i < count; ++i) {
        int64_t one[kMaxOperands];
        for (int64_t& offset : one) offset = a.begin + done + i;
        auto x = port.template load1_at<Use>(one);
        values[i] = element(x);
        port.template store1_at<Use>(x, one);
      }
      block(values, count);
    }
    return;
  }
  int filled = 0;
  const Layout& layout = *a.layout;
  walk(layout, a.begin, a.length, [&](const int64_t* offset, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      int64_t at[kMaxOperands] = {};
      for (int k = 0; k < layout.operands; ++k)
        at[k] = offset[k] + i * layout.stride[k][layout.ndim - 1];
      auto x = port.template load1_at<Use>(at);
      values[filled++] = element(x);
      port.template store1_at<Use>(x, at);
      if (filled == kSourceBlock) {
        block(values, filled);
        filled = 0;
      }
    }
  });
  if (filled > 0) block(values, filled);
}

// A filter as the values' type has it: never 0, so that zeros are no candidates.
template <class C>
PYSMOOTH_HD C least_of(double filter) {
  constexpr C kTiny = sizeof(C) == 4 ? static_cast<C>(1.40129846432481707e-45)
                                     : static_cast<C>(4.9406564584124654e-324);
  const C least = static_cast<C>(filter);
  return least < kTiny ? kTiny : least;
}

// Appends to `out` those of n values that reach the filter; `first` is the index of the first one.
template <class C>
PYSMOOTH_HD int collect(const C* values, int n, double filter, int64_t first, Candidate* out) {
  constexpr int W = lanes_of<C>;
  const C least = least_of<C>(filter);
  int found = 0;
  const auto keep = [&](int i) {
    out[found++] = {static_cast<double>(values[i]), static_cast<uint32_t>(first + i)};
  };
  int i = 0;
  for (; i + W <= n; i += W) {
    const vec<C> magnitudes = magnitude<C>(vector_io<C>::load(values + i));
    for (unsigned bits = mask_bits(magnitudes >= vec<C>{} + least); bits != 0; bits &= bits - 1)
      keep(i + __builtin_ctz(bits));
  }
  for (; i < n; ++i)
    if (values[i] >= least || values[i] <= -least) keep(i);
  return found;
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
    result->candidates += collect(values, count, task.filter, first, task.out + result->candidates);
}

// Appends the values whose bits are set in `words`, 64 to a word.
template <class C>
__attribute__((noinline)) Candidate* extract(const C* values, const uint64_t* words, int count,
                                             int64_t first, Candidate* out) {
  for (int w = 0; w < count; ++w)
    for (uint64_t bits = words[w]; bits != 0; bits &= bits - 1) {
      const int i = 64 * w + __builtin_ctzll(bits);
      *out++ = {static_cast<double>(values[i]), static_cast<uint32_t>(first + i)};
    }
  return out;
}

// A pass that only collects. Nobody can predict where the candidates are: the streams run without a
// branch on them, leave bits behind, and these are looked through block by block.
template <class Rule, class P, class G, bool kParam>
SourceResult filtering_pass(const ApplyArgs& a, const SourceTask& task) {
  using C = compute_t<P>;
  using Use = UsePass<Rule, 0, kParam>;
  constexpr int W = lanes_of<C>;
  const auto h = Rule::template prepare<C>(a.hyper, a.scalars);
  const Port<Rule, P, G> port(a);
  const C least = least_of<C>(task.filter);
  Candidate* out = task.out;
  alignas(64) C values[kSourceBlock];
  uint64_t words[kSourceBlock / 64];
  int64_t at[kMaxOperands];
  for (int64_t& offset : at) offset = a.begin;
  int64_t i = 0;
  while (i + 64 <= a.length) {
    const int64_t first = i;
    int count = 0;
    for (; i + 64 <= a.length && count < kSourceBlock / 64; ++count) {
      uint64_t word = 0;
#pragma GCC unroll 16
      for (int j = 0; j < 64; j += W) {
        auto x = port.template load<Use>(at, i + j);
        const vec<C> value = Rule::template source<0>(x, h);
        port.template store<Use>(x, at, i + j);
        vector_io<C>::store(values + (i - first) + j, value);
        word |= uint64_t{mask_bits(magnitude<C>(value) >= vec<C>{} + least)} << j;
      }
      words[count] = word;
      i += 64;
    }
    out = extract(values, words, count, first, out);
  }
  for (; i < a.length; ++i) {
    int64_t one[kMaxOperands];
    for (int64_t& offset : one) offset = a.begin + i;
    auto x = port.template load1_at<Use>(one);
    const C value = Rule::template source<0>(x, h);
    port.template store1_at<Use>(x, one);
    if (value >= least || value <= -least)
      *out++ = {static_cast<double>(value), static_cast<uint32_t>(i)};
  }
  return {0.0, out - task.out};
}

template <class Rule, int kStage, class P, class G, bool kParam>
SourceResult pass(const ApplyArgs& a, const SourceTask& task) {
  using C = compute_t<P>;
  if constexpr (Rule::kSelects && kStage == 0)
    if (a.layout == nullptr && task.filter >= 0.0)
      return filtering_pass<Rule, P, G, kParam>(a, task);
  const auto h = Rule::template prepare<C>(a.hyper, a.scalars);
  SourceResult result;
  int64_t done = 0;
  each_block<UsePass<Rule, kStage, kParam>, Rule, P, G>(
      a, [&h](auto& x) { return Rule::template source<kStage>(x, h); },
      [&](const C* values, int count) {
        digest(values, count, task, done, &result);
        done += count;
      });
  return result;
}

template <class Rule, int kStage, class P, class G>
SourceResult source(const ApplyArgs& a, const SourceTask& task) {
  if constexpr (Rule::kPass[kStage].reads_param && !Rule::kPass[kStage].writes_param)
    if (!task.reads_param) return pass<Rule, kStage, P, G, false>(a, task);
  return pass<Rule, kStage, P, G, true>(a, task);
}

// For samples, where time counts, and for second looks.
template <class Rule, class P, class G>
void values(const ApplyArgs& a, bool again, double* out) {
  using C = compute_t<P>;
  const auto h = Rule::template prepare<C>(a.hyper, a.scalars);
  const Port<Rule, P, G> port(a);
  int64_t i = 0;
  if (a.layout == nullptr && !again && std::is_same_v<C, float>) {
    constexpr int W = lanes_of<C>;
    int64_t at[kMaxOperands];
    for (int64_t& offset : at) offset = a.begin;
    for (; i + W <= a.length; i += W) {
      auto x = port.template load<UsePass<Rule, 0, true>>(at, i);
      alignas(64) C values[W];
      vector_io<C>::store(values, Rule::template source<0>(x, h));
      for (int j = 0; j < W; ++j) out[i + j] = static_cast<double>(values[j]);
    }
  }
  for (; i < a.length; ++i) {
    int64_t at[kMaxOperands];
    locate(a, a.begin + i, at);
    auto x = port.template load1_at<UsePass<Rule, 0, true>>(at);
    out[i] =
        static_cast<double>(again ? Rule::template again<0>(x, h) : Rule::template source<0>(x, h));
  }
}

template <class Rule, class P, class G>
void selected(const ApplyArgs& a, const SelectedTask& task) {
  using C = compute_t<P>;
  using Use = UseSelected<Rule>;
  const auto h = Rule::template prepare<C>(a.hyper, a.scalars);
  const Port<Rule, P, G> port(a);
  for (int64_t j = 0; j < task.count; ++j) {
    // Coordinates are far apart, and nothing but us knows which is next.
    constexpr int64_t kAhead = 16;
    if (a.layout == nullptr && j + kAhead < task.count) {
      const int64_t next = a.begin + task.chosen[j + kAhead].index;
      if constexpr (Use::kStreams.writes_param) __builtin_prefetch(port.param(next), 1);
      __builtin_prefetch(port.state(0, next), 1);
    }
    int64_t at[kMaxOperands];
    locate(a, a.begin + task.chosen[j].index, at);
    auto x = port.template load1_at<Use>(at);
    C c = static_cast<C>(task.chosen[j].value);
    if (task.fetch) c = Rule::template again<0>(x, h) * static_cast<C>(task.scale);
    Rule::selected(x, c, h);
    port.template store1_at<Use>(x, at);
  }
}

template <class Rule, class P, class G>
void fill(SourceInfo* info) {
  constexpr int p = static_cast<int>(dtype_traits<P>::value);
  constexpr int g = static_cast<int>(dtype_traits<G>::value);
  if constexpr (Rule::kStages > 0) info->source[0][p][g] = source<Rule, 0, P, G>;
  if constexpr (Rule::kStages > 1) info->source[1][p][g] = source<Rule, 1, P, G>;
  if constexpr (Rule::kSelects) {
    info->values[p][g] = values<Rule, P, G>;
    info->selected[p][g] = selected<Rule, P, G>;
  }
}

template <class Rule>
SourceInfo describe_source() {
  SourceInfo info{};
  if constexpr (Rule::kStages > 0) {
    fill<Rule, float, float>(&info);
    fill<Rule, double, double>(&info);
    fill<Rule, bf16, bf16>(&info);
    fill<Rule, f16, f16>(&info);
    fill<Rule, float, bf16>(&info);
    fill<Rule, float, f16>(&info);
  }
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

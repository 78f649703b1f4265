// apply, on CPU: one pass over parameter, gradient and states with a rule's update.

#include <utility>

#include "core/rules.h"
#include "cpu/port.h"

PYSMOOTH_KERNELS_BEGIN

// The whole vectors of a chunk whose states are bfloat16; returns how many elements that were.
template <class Rule>
int64_t apply_low(const ApplyArgs& a) {
  if (!LowPort<Rule>::fits(a)) return 0;
  const auto h = Rule::template prepare<float>(a.hyper, a.scalars);
  LowPort<Rule> port(a);
  int64_t i = 0;
  for (; i + kFloats <= a.length; i += kFloats) {
    auto x = port.template load<UseApply<Rule>>(i);
    Rule::update(x, h);
    port.template store<UseApply<Rule>>(&x, i);
  }
  return i;
}

template <class Rule, class C>
void apply(const ApplyArgs& args) {
  using Use = UseApply<Rule>;
  ApplyArgs a = args;
  if constexpr (Rule::kLowStates != 0 && Rule::kStages == 0 && sizeof(C) == 4) {
    const int64_t done = a.stochastic != 0 ? apply_low<Rule>(a) : 0;
    a.begin += done;
    a.length -= done;
  }
  const auto h = Rule::template prepare<C>(a.hyper, a.scalars);
  Drawing<C, Use::kStreams.draws> drawing(a, Rule::draw(a.hyper));
  Staging<C> run(a, touch_of<Rule>(Use::kStreams), drawing.most(Staging<C>::kNoLimit));
  [[maybe_unused]] int64_t done = 0;
  while (run.next()) {
    const Port<Rule, C> port(run.operand, a.scalars, drawing.next(run.count));
    for (int64_t i = 0; i < run.count; i += lanes_of<C>) {
      auto x = port.template load<Use>(i);
      if constexpr (Rule::kSendsSigns) x.grad = load_bits<C>(a.bits[0], done + i, C(-1), C(1));
      Rule::update(x, h);
      port.template store<Use>(x, i);
    }
    run.commit();
    done += run.count;
  }
}

template <class Rule, int... kStage>
constexpr unsigned idle_passes(std::integer_sequence<int, kStage...>) {
  return (0u | ... | (touch_of<Rule>(Rule::kPass[kStage]).writes == 0u ? 1u << kStage : 0u));
}

template <class Rule>
RuleInfo describe() {
  static_assert(Rule::kStates < kMaxStates, "room for the parameter's companion");
  RuleInfo info{};
  info.name = Rule::kName;
  info.states = Rule::kStates;
  info.reads_grad = Rule::kReadsGrad;
  info.counts_steps = Rule::kCountsSteps;
  info.low_states = Rule::kLowStates;
  info.sends_signs = Rule::kSendsSigns;
  info.absorbs = Rule::kAbsorbs;
  info.keeps_scale = Rule::kKeepsScale;
  info.accumulates = Rule::kAccumulates;
  info.accumulate = Rule::accumulate;
  info.derive = Rule::derive;
  for (const char* name : Rule::kHyper) info.hyper[info.hypers++] = name;
  info.stages = Rule::kStages;
  info.selections = selections_of<Rule>;
  info.marks = Rule::kMarks > 0;
  info.idle = idle_passes<Rule>(std::make_integer_sequence<int, Rule::kStages>{});
  info.applies = Rule::kApplies;
  info.stage_sum = Rule::stage_sum;
  info.reads_param = Rule::reads_param;
  info.selects_nothing = Rule::selects_nothing;
  if constexpr (Rule::kApplies) {
    info.apply[kFloat] = apply<Rule, float>;
    info.apply[kDouble] = apply<Rule, double>;
  }
  return info;
}

template <class... R>
constexpr int count(RuleList<R...>) {
  return sizeof...(R);
}
template <class... R>
const RuleInfo* describe_all(RuleList<R...>) {
  static const RuleInfo infos[] = {describe<R>()...};
  return infos;
}

KernelTable apply_table() {
  KernelTable table{};
  table.rules = describe_all(Rules{});
  table.rule_count = count(Rules{});
  return table;
}

PYSMOOTH_KERNELS_END

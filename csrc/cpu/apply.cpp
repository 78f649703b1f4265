// apply, on CPU: one pass over parameter, gradient and states with a rule's update.

#include "core/rules.h"
#include "cpu/port.h"

PYSMOOTH_KERNELS_BEGIN

template <class Rule, class C>
void apply(const ApplyArgs& a) {
  using Use = UseApply<Rule>;
  const auto h = Rule::template prepare<C>(a.hyper, a.scalars);
  Staging<C> run(a, touch_of<Rule>(Use::kStreams), Staging<C>::kNoLimit);
  while (run.next()) {
    const Port<Rule, C> port(run.operand, a.scalars);
    for (int64_t i = 0; i < run.count; i += lanes_of<C>) {
      auto x = port.template load<Use>(i);
      Rule::update(x, h);
      port.template store<Use>(x, i);
    }
    run.commit();
  }
}

template <class Rule>
RuleInfo describe() {
  RuleInfo info{};
  info.name = Rule::kName;
  info.states = Rule::kStates;
  info.reads_grad = Rule::kReadsGrad;
  info.counts_steps = Rule::kCountsSteps;
  info.accumulates = Rule::kAccumulates;
  info.accumulate = Rule::accumulate;
  info.derive = Rule::derive;
  for (const char* name : Rule::kHyper) info.hyper[info.hypers++] = name;
  info.stages = Rule::kStages;
  info.selects = Rule::kSelects;
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

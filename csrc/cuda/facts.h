// What the host knows of the rules. Not for what nvcc compiles: before version 13 it takes the list
// of a rule's hyper-parameters for an array of unknown length.
#pragma once

#include "core/rules.h"
#include "core/streams.h"

namespace pysmooth::cuda {

struct RuleFacts {
  const char* name = nullptr;
  int states = 0, stages = 0;
  unsigned low_states = 0;
  bool reads_grad = true, counts_steps = false, accumulates = false, keeps_scale = false;
  bool sends_signs = false, selects = false, marks = false, applies = true, absorbs = false;
  int selections = 0;  // passes that are selected from
  int scales = 0;      // passes whose sums are scales of compressors
  int hypers = 0;
  const char* const* hyper = nullptr;
};

template <class Rule>
RuleFacts facts_of() {
  RuleFacts out;
  out.name = Rule::kName;
  out.states = Rule::kStates;
  out.stages = Rule::kStages;
  out.low_states = Rule::kLowStates;
  out.reads_grad = Rule::kReadsGrad;
  out.counts_steps = Rule::kCountsSteps;
  out.accumulates = Rule::kAccumulates;
  out.keeps_scale = Rule::kKeepsScale;
  out.sends_signs = Rule::kSendsSigns;
  out.selects = Rule::kSelects;
  out.marks = Rule::kMarks > 0;
  out.selections = generic::selections_of<Rule>;
  out.scales = Rule::kScales;
  out.applies = Rule::kApplies;
  out.absorbs = Rule::kAbsorbs;
  out.hypers = static_cast<int>(sizeof(Rule::kHyper) / sizeof(Rule::kHyper[0]));
  out.hyper = Rule::kHyper;
  return out;
}

template <class... R>
const RuleFacts* all_facts(generic::RuleList<R...>) {
  static const RuleFacts facts[] = {facts_of<R>()...};
  return facts;
}
inline const RuleFacts& facts(int rule) { return all_facts(generic::Rules{})[rule]; }

}  // namespace pysmooth::cuda

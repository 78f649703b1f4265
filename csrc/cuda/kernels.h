// The kernels, by rule and by how operands lie in registers. Filled in by the files that hold them.
#pragma once

#include "core/rules.h"
#include "core/streams.h"
#include "cuda/plan.h"

namespace pysmooth::cuda {

template <class... R>
constexpr int count_of(generic::RuleList<R...>) {
  return sizeof...(R);
}
constexpr int kRules = count_of(generic::Rules{});

// Numbers that a kernel carries with it, to be written to device memory.
template <int kWords>
struct Payload {
  uint64_t word[kWords];
};
constexpr int kFewWords = 480, kManyWords = 4000;
template <int kWords>
using PutKernel = void (*)(uint64_t* at, int words, Payload<kWords> payload);

struct KernelTable {
  Kernel reduce[kReductions];
  Kernel row_sums, row_coefs;
  Kernel prepare;
  Kernel source[kRules][kMaxStages][kAccesses];
  Kernel apply[kRules][kAccesses];
  Kernel begin_select, set_filter;
  // Of the passes that are selected from.
  using Selecting = Kernel[kRules][kMaxSelections][kAccesses];
  Selecting sample, narrow, selected, select_block;
  PutKernel<kFewWords> put_few;
  PutKernel<kManyWords> put_many;
};

void fill_common(KernelTable* table);
// Rules are compiled in several parts: rule r belongs to part r modulo kParts.
constexpr int kParts = 4;
void fill_part_0(KernelTable* table);
void fill_part_1(KernelTable* table);
void fill_part_2(KernelTable* table);
void fill_part_3(KernelTable* table);

inline const KernelTable& kernels() {
  static const KernelTable table = [] {
    KernelTable out{};
    fill_common(&out);
    fill_part_0(&out);
    fill_part_1(&out);
    fill_part_2(&out);
    fill_part_3(&out);
    return out;
  }();
  return table;
}

// What the host knows of a rule.
struct RuleFacts {
  const char* name = nullptr;
  int states = 0, stages = 0;
  unsigned low_states = 0;
  bool reads_grad = true, counts_steps = false, accumulates = false, keeps_scale = false;
  bool sends_signs = false, selects = false, marks = false, applies = true;
  int selections = 0;  // passes that are selected from
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
  out.applies = Rule::kApplies;
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

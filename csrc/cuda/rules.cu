// The kernels of the rules of one part. Compiled kParts times, with PYSMOOTH_PART from 0 on.

#include "cuda/absorb.cuh"
#include "cuda/apply.cuh"
#include "cuda/kernels.h"
#include "cuda/single.cuh"
#include "cuda/source.cuh"

namespace pysmooth::cuda {
namespace {  // functions of one name differ from part to part

template <class Rule, int kStage, class A>
void fill_stage(KernelTable* table, int rule, Access access) {
  table->source[rule][kStage][access] = generic::source<Rule, kStage, A>;
  if constexpr (Rule::kScales > 0)
    table->source_blocks[rule][kStage][access] = generic::source<Rule, kStage, A, false, true>;
  if constexpr (kStage < generic::selections_of<Rule>) {
    table->sample[rule][kStage][access] = generic::sample<Rule, kStage, A>;
    table->narrow[rule][kStage][access] = generic::narrow<Rule, kStage, A>;
    table->selected[rule][kStage][access] = generic::selected<Rule, kStage, A>;
    table->select_block[rule][kStage][access] = generic::select_block<Rule, kStage, A>;
  }
}

template <class Rule, class A, int... kStage>
void fill_stages([[maybe_unused]] KernelTable* table, [[maybe_unused]] int rule,
                 [[maybe_unused]] Access access, std::integer_sequence<int, kStage...>) {
  (fill_stage<Rule, kStage, A>(table, rule, access), ...);
}

template <class Rule, class A>
void fill_access(KernelTable* table, int rule, Access access) {
  if constexpr (Rule::kApplies) table->apply[rule][access] = generic::apply<Rule, A>;
  if constexpr (Rule::kApplies && Rule::kStages == 0)
    table->single[rule][access] = generic::single<Rule, A>;
  if constexpr (Rule::kAbsorbs) {
    table->take_in[rule][access] = generic::take_in<Rule, A>;
    table->absorbed[rule][access] = generic::source<Rule, 0, A, true>;
    if constexpr (Rule::kScales > 0)
      table->absorbed_blocks[rule][access] = generic::source<Rule, 0, A, true, true>;
  }
  // Others have compressed when they come to apply.
  if constexpr (Rule::kScales > 0) {
    constexpr bool kCompresses = Rule::kApply.draws;
    table->apply_blocks[rule][access] = generic::apply<Rule, A, kCompresses>;
  }
  fill_stages<Rule, A>(table, rule, access, std::make_integer_sequence<int, Rule::kStages>{});
}

template <int kRule, class Rule>
void fill_rule(KernelTable* table) {
  if constexpr (kRule % kParts == PYSMOOTH_PART) {
    fill_access<Rule, generic::PlainAccess>(table, kRule, kPlain);
    fill_access<Rule, generic::MixedAccess>(table, kRule, kMixed);
    fill_access<Rule, generic::WideAccess>(table, kRule, kWide);
  }
}

template <int... kRule, class... R>
void fill_rules(KernelTable* table, std::integer_sequence<int, kRule...>, generic::RuleList<R...>) {
  (fill_rule<kRule, R>(table), ...);
}

}  // namespace

#define PYSMOOTH_JOIN(a, b) a##b
#define PYSMOOTH_FILL_PART(part) PYSMOOTH_JOIN(fill_part_, part)

void PYSMOOTH_FILL_PART(PYSMOOTH_PART)(KernelTable* table) {
  fill_rules(table, std::make_integer_sequence<int, kRules>{}, generic::Rules{});
}

}  // namespace pysmooth::cuda

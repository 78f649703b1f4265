// The kernels of the rules of one part. Compiled kParts times, with PYSMOOTH_PART from 0 on.

#include "cuda/apply.cuh"
#include "cuda/kernels.h"
#include "cuda/source.cuh"

namespace pysmooth::cuda {
namespace {  // functions of one name differ from part to part

template <class Rule, class A>
void fill_access(KernelTable* table, int rule, Access access) {
  if constexpr (Rule::kApplies) table->apply[rule][access] = generic::apply<Rule, A>;
  if constexpr (Rule::kStages > 0) table->source[rule][0][access] = generic::source<Rule, 0, A>;
  if constexpr (Rule::kStages > 1) table->source[rule][1][access] = generic::source<Rule, 1, A>;
  if constexpr (Rule::kSelects) {
    table->sample[rule][access] = generic::sample<Rule, A>;
    table->narrow[rule][access] = generic::narrow<Rule, A>;
    table->selected[rule][access] = generic::selected<Rule, A>;
    table->select_block[rule][access] = generic::select_block<Rule, A>;
  }
}

template <int kRule, class Rule>
void fill_rule(KernelTable* table) {
  if constexpr (kRule % kParts == PYSMOOTH_PART && Rule::kMarks == 0) {
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

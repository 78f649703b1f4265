// Which operands a kernel reads and writes, as bits: parameter, gradient, states.
#pragma once

#include "core/rule.h"

PYSMOOTH_KERNELS_BEGIN

PYSMOOTH_HD constexpr bool has(unsigned set, int k) { return (set >> k & 1u) != 0; }

// Operands that are rounded stochastically take turns: the lower and upper half of a word, then
// those of the next one.
PYSMOOTH_HD int turn_of(unsigned stochastic, int k) {
  int before = 0;
  for (int i = 0; i < k; ++i) before += static_cast<int>(stochastic >> i & 1u);
  return before;
}
PYSMOOTH_HD int noise_shift(int turn) { return turn % 2 * 16; }

// How many of a rule's passes are selected from.
template <class Rule>
constexpr int selections_of = Rule::kSelects ? 1 : Rule::kMarks;

struct Touch {
  unsigned reads, writes;
};
template <class Rule>
constexpr Touch touch_of(Streams s) {
  constexpr unsigned kHeld = (1u << Rule::kStates) - 1u;
  return {(s.reads_param ? 1u : 0u) | (s.reads_grad && Rule::kReadsGrad ? 2u : 0u) |
              (s.reads_state & kHeld) << 2,
          (s.writes_param ? 1u : 0u) | (s.writes_state & kHeld) << 2};
}

template <class Rule>
struct UseApply {
  static constexpr Streams kStreams = Rule::kApply;
};
template <class Rule, int kStage>
struct UsePass {
  static constexpr Streams kStreams = Rule::kPass[kStage];
};
template <class Rule>
struct UseAgain {
  static constexpr Streams kStreams = Rule::kAgain;
};
// `kFetch`: the values that were selected are read as well.
template <class Rule, bool kFetch>
struct UseSelected {
  static constexpr Streams kStreams =
      kFetch ? with_reads(Rule::kSelected, Rule::kAgain) : Rule::kSelected;
};

PYSMOOTH_KERNELS_END

// The passes between reduce and apply: sources, their sums, and selection.
#pragma once

#include <algorithm>

#include "cpu/run.h"
#include "cpu/schedule.h"

namespace pysmooth {

// What a kernel is told about a chunk.
ApplyArgs args_of(const Pipeline& p, const RuleInfo& rule, const Chunk& chunk);

// Runs body(args, number) on the blocks of a chunk, telling each what it knows of `known` passes'
// scales: those of the block, where a pass takes them per block.
template <class Body>
void each_block(const Pipeline& p, int64_t chunk, ApplyArgs args, int known, Body body) {
  const Staged& s = p.staged;
  const int64_t end = args.begin + args.length;
  for (size_t number = s.blocks_at[static_cast<size_t>(chunk)]; args.begin < end; ++number) {
    args.length = std::min(p.select.block, end - args.begin);
    for (int stage = 0; stage < known; ++stage)
      if (p.stage_scope[stage] == Scope::block)
        args.scalars.stage[stage] = s.block_values[stage][number];
    body(args, number);
    args.begin += args.length;
  }
}

// Which passes this step has. One thread, once gradients are known.
void prepare_stages(Pipeline* p, const KernelTable& table, int threads);

// Runs them; called by every thread of the team (or by the only one).
void run_stages(Pipeline* p, const KernelTable& table, Schedule* schedule, int threads);

}  // namespace pysmooth

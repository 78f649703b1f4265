// The passes between reduce and apply: sources, their sums, and selection.
#pragma once

#include "cpu/run.h"
#include "cpu/schedule.h"

namespace pysmooth {

// What a kernel is told about a chunk.
ApplyArgs args_of(const Pipeline& p, const RuleInfo& rule, const Chunk& chunk);

// Which passes this step has. One thread, once gradients are known.
void prepare_stages(Pipeline* p, const KernelTable& table, int threads);

// Runs them; called by every thread of the team (or by the only one).
void run_stages(Pipeline* p, const KernelTable& table, Schedule* schedule, int threads);

}  // namespace pysmooth

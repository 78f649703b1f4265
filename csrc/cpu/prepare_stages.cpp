// What a step's passes before apply find ready: which there are, what is selected from, and room.
#include <algorithm>
#include <atomic>
#include <memory>

#include "cpu/staged.h"

namespace pysmooth {
namespace {

void lay_out_bits(Pipeline* p) {
  Staged& s = p->staged;
  s.bits_at.assign(1, 0);
  for (int64_t i = 0; i < p->chunks.size(); ++i)
    s.bits_at.push_back(s.bits_at.back() + static_cast<size_t>(p->chunks[i].length + 63) / 64);
  const size_t words = s.bits_at.back() * static_cast<size_t>(s.bit_sets);
  if (s.bits.size() < words) s.bits.resize(words);
}

void lay_out_blocks(Pipeline* p) {
  Staged& s = p->staged;
  size_t blocks = 0;
  s.blocks_at.clear();
  for (int64_t i = 0; i < p->chunks.size(); ++i) {
    s.blocks_at.push_back(blocks);
    blocks += static_cast<size_t>((p->chunks[i].length + p->select.block - 1) / p->select.block);
  }
  for (int stage = 0; stage < kMaxStages; ++stage)
    if (p->stage_scope[stage] == Scope::block) s.block_values[stage].assign(blocks, 0.0);
}

}  // namespace

void prepare_stages(Pipeline* p, const KernelTable& table, int threads) {
  Staged& s = p->staged;
  const size_t tensors = p->slots.size();
  s.stages = 0;
  s.selected_passes = s.bit_sets = 0;
  // Other processes may have a gradient where none is here, and all have to make the same calls.
  for (const Slot& slot : p->slots)
    if (slot.active || p->exchange != nullptr)
      s.stages = std::max(s.stages, table.rules[slot.rule].stages);
  if (s.stages == 0) return;
  for (std::vector<double>& values : s.values) values.assign(tensors, 0.0);
  if (p->scales_blocks()) lay_out_blocks(p);
  s.results.resize(static_cast<size_t>(p->chunks.size()));
  if (s.stores.size() < static_cast<size_t>(threads)) s.stores.resize(static_cast<size_t>(threads));
  for (PickStore& store : s.stores) store.clear();
  s.active.assign(tensors, 0);
  s.numels.resize(tensors);
  s.units.clear();
  s.unit_of.assign(tensors, -1);
  const bool global = p->select.scope == SelectScope::global;
  for (size_t t = 0; t < tensors; ++t) {
    const Slot& slot = p->slots[t];
    s.numels[t] = slot.numel;
    const RuleInfo& rule = table.rules[slot.rule];
    if (!slot.active) continue;
    if (rule.sends_signs) s.bit_sets = std::max(s.bit_sets, 1);
    if (rule.selections == 0 ||
        rule.selects_nothing(p->groups[static_cast<size_t>(slot.group)].hyper))
      continue;
    s.selected_passes = std::max(s.selected_passes, rule.selections);
    if (rule.marks) s.bit_sets = std::max(s.bit_sets, rule.selections);
    s.active[t] = 1;
    if (!global || s.units.empty()) s.units.push_back({t, t + 1, 0, 0, 0.0, false, false, 0.0});
    SelectUnit& unit = s.units.back();
    unit.last_slot = t + 1;
    unit.elements += p->selects_jointly ? slot.elements : slot.numel;
    s.unit_of[t] = static_cast<int>(s.units.size()) - 1;
  }
  if (s.bit_sets > 0) lay_out_bits(p);
  if (s.selected_passes == 0) return;
  s.lists.resize(static_cast<size_t>(p->chunks.size()));
  s.tallies.resize(s.units.size());
  s.kept = std::make_unique<std::atomic<int64_t>[]>(s.units.size());
  for (SelectUnit& unit : s.units) unit.k = p->select.chosen_of(unit.elements);
}

}  // namespace pysmooth

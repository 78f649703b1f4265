// The launches of a step, and of a gradient that is absorbed.
#include <algorithm>

#include "cuda/device_plan.h"
#include "cuda/facts.h"
#include "cuda/kernels.h"
#include "cuda/pieces.h"

namespace pysmooth::cuda {

bool DevicePlan::reduces(const GroupInput* groups) const {
  if (settings_.absorbs) return false;  // whoever took gradients in looked at them
  return settings_.always_norm || accumulates_ || asks_first(settings_.policy) ||
         std::any_of(groups, groups + groups_,
                     [](const GroupInput& g) { return g.clip.needs_norm(); });
}

bool DevicePlan::shares_pass(int stage) const {
  const Scope scope = settings_.stage_scope[stage];
  const bool shared =
      settings_.spread ? scope != Scope::block
                       : settings_.sites > 1 && (scope == Scope::global || scope == Scope::group);
  return shared && std::any_of(classes_.begin(), classes_.end(),
                               [stage](const Class& c) { return stage < facts(c.rule).stages; });
}

size_t DevicePlan::units_of(Scope scope) const {
  return scope == Scope::global  ? 1
         : scope == Scope::group ? static_cast<size_t>(groups_)
                                 : tensors_.size();
}

std::vector<int> DevicePlan::selecting_tensors() const {
  std::vector<int> out;
  for (const Unit& unit : units_) out.push_back(unit.first_tensor);
  return out;
}

DevicePlan::Absorption DevicePlan::absorption(size_t t) const {
  const Tensor& tensor = tensors_[t];
  const Access access = classes_[static_cast<size_t>(class_of_[t])].access;
  const KernelTable& table = kernels();
  const auto work = [&](int rows, int teams) {
    Work out{};
    out.tensor = static_cast<int32_t>(t);
    out.rows = rows;
    out.count = parts_of(tensor.numel, int64_t{kRow} * rows * teams);
    out.blocks = blocks_for(out.count);
    return out;
  };
  Absorption out{table.admit, work(kRows, teams_of(16 / itemsize(tensor.grad_dtype))), {}};
  if (!asks_first(settings_.policy)) out.admitted.count = out.admitted.blocks = 1;
  const int rows = rows_for(tensor.numel, access, settings_.multiprocessors);
  const Work pass = work(rows, teams_of(access));
  out.pass = {table.take_in[tensor.rule][access], pass.blocks, pass};
  return out;
}

std::vector<Launch> DevicePlan::all_launches(void* device, const GroupInput* groups,
                                             Part part) const {
  const auto* const items = reinterpret_cast<const Item*>(static_cast<char*>(device) + at_.items);
  const KernelTable& table = kernels();
  std::vector<Launch> out;
  const auto add = [&](Kernel kernel, const Listed& listed, int rows, int stage) {
    Work work{};
    work.items = items + listed.first;
    work.count = listed.count;
    work.rows = rows;
    work.stage = stage;
    work.blocks = blocks_for(listed.count);
    out.push_back({kernel, work.blocks, work});
  };
  const auto prepare = [&](int stage) {
    Work work{};
    work.stage = stage;
    const auto n = static_cast<int>(tensors_.size());
    out.push_back({table.prepare, std::max(1, (n + kThreads - 1) / kThreads), work});
  };
  // What a plan of all of them tells of each, and waits for the others.
  const auto tell = [&](Kernel kernel, int stage, Meeting meets, bool largest) {
    Work work{};
    work.stage = stage;
    const auto n = static_cast<int>(tensors_.size());
    out.push_back({kernel, std::max(1, (n + kThreads - 1) / kThreads), work, meets, largest});
  };
  const auto conclude = [&](Kernel kernel, int stage) {
    Work work{};
    work.stage = stage;
    out.push_back({kernel, 1, work});
  };
  const auto join = [&](Scope scope, bool largest, size_t each) {
    const bool joins = scope == Scope::global || scope == Scope::group;
    out.back().meets = Meeting::units;
    out.back().largest = largest;
    out.back().count = static_cast<int>(kJoinedUnits + (joins ? each * units_of(scope) : 0));
  };
  // What follows from the sums of all devices, or of all processes.
  const auto meet_norms = [&](int kind) {
    if (settings_.sites > 1) {
      tell(table.publish, 0, Meeting::devices, false);
      conclude(table.conclude[kind], 0);
    }
    if (!settings_.spread) return;
    const auto reduction = static_cast<Reduction>(kind);
    const bool largest = reduction == Reduction::max_abs || reduction == Reduction::min_abs;
    tell(table.tell_parts, kind, Meeting::parts, largest);
    if (!settings_.joins) return conclude(table.conclude_parts[kind], 0);
    conclude(table.total_parts[kind], 0);
    join(settings_.scope, largest, 1);
    conclude(table.conclude_units[kind], 0);
    if (!accumulates_ || settings_.scope == Scope::tensor) return;
    join(settings_.scope, false, 1);
    conclude(table.conclude_accumulated, 0);
  };
  const auto meet_sums = [&](int stage) {
    const Scope scope = settings_.stage_scope[stage];
    if (settings_.sites > 1) {
      tell(table.publish, stage, Meeting::devices, false);
      conclude(table.conclude_pass, stage);
    }
    if (!settings_.spread) return;
    tell(table.tell_pass, stage, Meeting::parts, false);
    if (!settings_.joins || scope == Scope::tensor)
      return conclude(table.conclude_parts_of_pass, stage);
    conclude(table.total_parts_of_pass, stage);
    join(scope, false, 2);
    conclude(table.conclude_units_of_pass, stage);
  };
  // A block per item, for the classes of tensors that select.
  const auto selecting = [&](const KernelTable::Selecting& of, int stage, int64_t piece,
                             int digit) {
    const size_t first = out.size();
    int blocks = 0;
    for (size_t c = 0; c < classes_.size(); ++c) {
      const Listed& listed = cuts_[c].select;
      if (listed.count == 0) continue;
      add(of[classes_[c].rule][stage][classes_[c].access], listed, 0, digit);
      out.back().blocks = listed.count;
      out.back().work.piece = piece;
      blocks += listed.count;
    }
    for (size_t i = first; i < out.size(); ++i) out[i].work.blocks = blocks;
  };
  const auto units = [&](Kernel kernel) {
    out.push_back({kernel, static_cast<int>(units_.size()), Work{}});
  };
  const SelectSpec& spec = settings_.select;
  const bool selects = !units_.empty();
  const bool by_blocks = spec.scope == SelectScope::block && spec.kind == Selector::top_k;
  const bool filters = selects && spec.kind == Selector::top_k && !by_blocks;

  if (rows_.count > 0 && part != Part::rest) {
    add(table.row_sums, rows_, 0, 0);
    add(table.row_coefs, rows_, 0, 0);
  }
  if (reduces(groups) && part != Part::rest) {
    const int kind = static_cast<int>(reduction_of(settings_.norm_type));
    add(table.reduce[kind], reduce_, 0, 0);
    meet_norms(kind);
  }
  if (part == Part::norms) return out;
  prepare(-1);
  const auto sample = [&](int stage) {
    units(table.begin_select);
    if (!filters) return;
    for (size_t c = 0; c < classes_.size(); ++c) {
      if (cuts_[c].sample.count == 0) continue;
      add(table.sample[classes_[c].rule][stage][classes_[c].access], cuts_[c].sample, 0, 0);
      constexpr int kLines = kThreads / kSampleLine;
      out.back().blocks = (cuts_[c].sample.count + kLines - 1) / kLines;
      out.back().work.first = int64_t{cuts_[c].sample_first} * kSampleLine;
    }
    units(table.set_filter);
  };
  for (int stage = 0; stage < kMaxStages; ++stage) {
    const bool selected_from = selects && stage < selections_;
    if (selected_from && !by_blocks) sample(stage);
    const size_t first = out.size();
    int blocks = 0;
    for (size_t c = 0; c < classes_.size(); ++c) {
      if (stage >= facts(classes_[c].rule).stages || cuts_[c].source.count == 0) continue;
      const auto& [rule, access, tensors] = classes_[c];
      const Kernel whole =
          settings_.absorbs ? table.absorbed[rule][access] : table.source[rule][stage][access];
      const Kernel by_block = settings_.absorbs ? table.absorbed_blocks[rule][access]
                                                : table.source_blocks[rule][stage][access];
      add(scales_blocks() ? by_block : whole, cuts_[c].source, kRows, stage);
      out.back().work.first = cuts_[c].signs;
      blocks += out.back().blocks;
    }
    for (size_t i = first; i < out.size(); ++i) out[i].work.blocks = blocks;
    if (shares_pass(stage)) meet_sums(stage);
    if (out.size() > first && settings_.stage_scope[stage] == Scope::block)
      add(table.scale_blocks, blocks_, 0, stage);
    else if (out.size() > first)
      prepare(stage);
    if (!selected_from) continue;
    if (filters)
      for (int digit = 0; digit < digits_; ++digit) {
        selecting(table.narrow, stage, kSelectPiece, digit);
        if (!selects_jointly()) continue;
        out.back().meets = Meeting::histograms;
        units(table.take_digit_of_all);
        out.back().work.stage = digit;
      }
    if (by_blocks)
      selecting(table.select_block, stage, spec.block, 0);
    else
      selecting(table.selected, stage, kSelectPiece, 0);
  }
  for (size_t c = 0; c < classes_.size(); ++c) {
    if (!facts(classes_[c].rule).applies || cuts_[c].apply.count == 0) continue;
    const auto& [rule, access, tensors] = classes_[c];
    const bool by_block = scales_blocks() && facts(rule).scales > 0;
    add(by_block ? table.apply_blocks[rule][access] : table.apply[rule][access], cuts_[c].apply,
        cuts_[c].apply_rows, 0);
    out.back().work.first = cuts_[c].signs;
  }
  return out;
}

SingleKernel DevicePlan::single_kernel() const {
  if (classes_.size() != 1 || cuts_[0].apply.count == 0 || rows_.count > 0 || settings_.absorbs ||
      settings_.sites > 1 || settings_.spread ||
      reduction_of(settings_.norm_type) != Reduction::sum_squares)
    return nullptr;
  return kernels().single[classes_[0].rule][classes_[0].access];
}

Single DevicePlan::single(void* device, const GroupInput* groups) const {
  const std::vector<Launch> all = all_launches(device, groups, Part::whole);
  Single out{single_kernel(), 1, {}, all.back().work};
  if (reduces(groups)) out.reducing = all.front().work;
  for (const Launch& one : all) out.blocks = std::max(out.blocks, one.blocks);
  out.blocks = std::min(out.blocks, resident_blocks_);
  return out;
}

int64_t DevicePlan::streamed_bytes() const {
  int64_t out = 0;
  for (const Tensor& tensor : tensors_) {
    const RuleFacts& rule = facts(tensor.rule);
    int64_t each = itemsize(tensor.param_dtype);
    if (rule.reads_grad) each += itemsize(tensor.grad_dtype);
    for (int k = 0; k < rule.states + (has_companion(tensor.storage) ? 1 : 0); ++k)
      each += itemsize(tensor.state_dtype[k]);
    out += each * tensor.numel;
  }
  return out;
}

std::vector<Launch> DevicePlan::launches(void* device, const GroupInput* groups, Part part,
                                         int phase) const {
  std::vector<Launch> all = all_launches(device, groups, part);
  const auto meets = [](const Launch& one) { return one.meets != Meeting::none; };
  auto begin = all.begin();
  for (int i = 0; i < phase; ++i) begin = std::find_if(begin, all.end(), meets) + 1;
  auto end = std::find_if(begin, all.end(), meets);
  if (end != all.end()) ++end;
  return {begin, end};
}

std::vector<Launch> DevicePlan::meetings(const GroupInput* groups, Part part) const {
  std::vector<Launch> out;
  for (const Launch& one : all_launches(nullptr, groups, part))
    if (one.meets != Meeting::none) out.push_back(one);
  return out;
}

}  // namespace pysmooth::cuda

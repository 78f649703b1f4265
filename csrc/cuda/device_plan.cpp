#include "cuda/device_plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/chunks.h"
#include "cuda/kernels.h"

namespace pysmooth::cuda {
namespace {

constexpr int kRows = kPassElements / kRow;
constexpr int64_t kDirect = 4096;       // a unit of so few elements is selected from as a whole
constexpr int64_t kMostLines = 256;     // of a unit's sample
constexpr int64_t kSelectPiece = 8192;  // elements that a block looks at

Access access_of(const Tensor& tensor) {
  if (tensor.param_dtype == DType::f64) return kWide;
  bool plain = tensor.param_dtype == DType::f32;
  if (facts(tensor.rule).reads_grad) plain = plain && tensor.grad_dtype == DType::f32;
  for (int k = 0; k < facts(tensor.rule).states; ++k)
    plain = plain && tensor.state_dtype[k] == DType::f32;
  return plain ? kPlain : kMixed;
}

// Teams of a warp where each thread holds so many elements.
constexpr int teams_of(int group) { return kWarp / (kRow / group); }
constexpr int teams_of(Access access) { return teams_of(access == kMixed ? 8 : 4); }

template <class T>
void write(std::vector<char>* image, size_t at, const std::vector<T>& values) {
  if (!values.empty()) std::memcpy(image->data() + at, values.data(), sizeof(T) * values.size());
}

int blocks_for(int warps) { return std::max(1, (warps + kWarps - 1) / kWarps); }

}  // namespace

DevicePlan::DevicePlan(const std::vector<Tensor>& tensors, int groups, const Settings& settings)
    : tensors_(tensors), groups_(groups), settings_(settings) {
  if (settings.stage_scope[0] == Scope::block)
    throw std::invalid_argument("scales of blocks have no CUDA kernel");
  for (size_t t = 0; t < tensors_.size(); ++t) {
    const Tensor& tensor = tensors_[t];
    accumulates_ = accumulates_ || tensor.norm_sq != nullptr;
    const auto number = [this](const Layout* layout) {
      if (layout == nullptr) return -1;
      layouts_.push_back(*layout);
      return static_cast<int>(layouts_.size()) - 1;
    };
    layout_of_.push_back(number(tensor.layout));
    grad_layout_of_.push_back(number(tensor.grad_layout));
    row_cut_of_.push_back(-1);
    if (tensor.rows != nullptr && tensor.numel > 0) {
      row_cut_of_.back() = static_cast<int32_t>(row_cuts_.size());
      RowCut& cut = row_cuts_.emplace_back();
      cut.param_layout = number(tensor.rows->param_layout);
      cut.grad_layout = number(tensor.rows->grad_layout);
    }
    const Access access = access_of(tensor);
    auto found = std::find_if(classes_.begin(), classes_.end(), [&](const Class& c) {
      return c.rule == tensor.rule && c.access == access;
    });
    if (found == classes_.end()) found = classes_.insert(classes_.end(), {tensor.rule, access, {}});
    found->tensors.push_back(static_cast<int>(t));
    class_of_.push_back(static_cast<int32_t>(found - classes_.begin()));
  }
  cut();
}

// Room for a sum per run of a row's part in a chunk, and for a coefficient per row.
void DevicePlan::cut_rows() {
  std::vector<int> tensors;
  for (size_t t = 0; t < tensors_.size(); ++t) {
    if (row_cut_of_[t] < 0) continue;
    const Tensor& tensor = tensors_[t];
    const RowShape& shape = *tensor.rows;
    RowCut& cut = row_cuts_[static_cast<size_t>(row_cut_of_[t])];
    tensors.push_back(static_cast<int>(t));
    cut.param = shape.param;
    cut.param_dtype = static_cast<uint8_t>(shape.param_dtype);
    cut.rows = shape.rows;
    cut.length = shape.length;
    cut.run = shape.run;
    cut.runs =
        static_cast<int32_t>((std::min(shape.length, kChunk) + kFoldElements - 1) / kFoldElements);
    cut.first_sum = row_sums_;
    cut.first_chunk = row_chunks_;
    cut.first_coef = row_coef_bytes_;
    const int64_t chunks = (tensor.numel + kChunk - 1) / kChunk;
    row_sums_ += (shape.rows + chunks) * cut.runs;
    row_chunks_ += chunks;
    row_coef_bytes_ += shape.rows * (tensor.param_dtype == DType::f64 ? 8 : 4);
    row_coef_bytes_ = (row_coef_bytes_ + 7) / 8 * 8;
  }
  rows_ = list(tensors, kChunk);
}

// Units of the selection. Room for candidates: twice as many as are wanted, and some per cent.
void DevicePlan::cut_units() {
  const SelectSpec& spec = settings_.select;
  const bool together = spec.kind == Selector::top_k && spec.scope == SelectScope::global;
  int64_t first = 0;
  for (size_t t = 0; t < tensors_.size(); ++t) {
    const Tensor& tensor = tensors_[t];
    const auto index = static_cast<int32_t>(t);
    const RuleFacts& rule = facts(tensor.rule);
    const bool selects = rule.selections > 0 && spec.kind != Selector::none;
    if (selects && selections_ != 0 && selections_ != rule.selections)
      throw std::invalid_argument("rules that select once and rules that mark in one plan");
    if (selects) selections_ = rule.selections;
    first_mark_.push_back(selects && rule.marks ? mark_words_ : -1);
    if (selects && rule.marks) mark_words_ += (tensor.numel + 31) / 32 * kMaxSelections;
    if (!together) first = 0;
    select_first_.push_back(first);
    if (selects && (!together || units_.empty()))
      units_.push_back({index, index + 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, {}});
    unit_of_.push_back(selects ? static_cast<int32_t>(units_.size()) - 1 : -1);
    if (!selects) continue;
    Unit& unit = units_.back();
    unit.last_tensor = index + 1;
    unit.elements += tensor.numel;
    if (tensor.param_dtype == DType::f64) unit.wide = 1;
    first += tensor.numel;
  }
  for (Unit& unit : units_) {
    while (unit.elements >> unit.place_bits != 0) ++unit.place_bits;
    unit.first_candidate = candidates_;
    unit.room =
        std::min(unit.elements, 2 * spec.chosen_of(unit.elements) + unit.elements / 32 + kDirect);
    candidates_ += unit.room;
    const int digits = ((unit.wide != 0 ? 63 : 31) + kDigitBits - 1) / kDigitBits +
                       (unit.place_bits + kDigitBits - 1) / kDigitBits;
    digits_ = std::max(digits_, digits);
  }
}

// Lines of neighbouring elements to be looked at before the pass: one at random from each of as
// many equal stretches of a unit. None where the unit is small, and its values are all candidates.
void DevicePlan::list_sample() {
  std::vector<std::vector<Item>> of(classes_.size());
  for (const Unit& unit : units_) {
    if (unit.elements <= kDirect) continue;
    const int64_t lines = std::clamp<int64_t>(unit.elements / 128, 64, kMostLines);
    const int64_t all = unit.elements / kSampleLine;
    int t = unit.first_tensor;
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t begin = all * line / lines, end = all * (line + 1) / lines;
      const int64_t at =
          begin + mix32(static_cast<uint32_t>(line) + 1) % std::max<int64_t>(1, end - begin);
      const auto past = [&](int i) {
        const auto s = static_cast<size_t>(i);
        return unit_of_[s] < 0 || at * kSampleLine >= select_first_[s] + tensors_[s].numel;
      };
      while (past(t)) ++t;
      const auto s = static_cast<size_t>(t);
      const int64_t own = std::max<int64_t>(0, at * kSampleLine - select_first_[s]) / kSampleLine;
      of[static_cast<size_t>(class_of_[s])].push_back({t, static_cast<int32_t>(own)});
    }
  }
  for (size_t c = 0; c < classes_.size(); ++c) {
    cuts_[c].sample = {items_.size(), static_cast<int>(of[c].size())};
    cuts_[c].sample_first = sample_lines_;
    for (const Item& item : of[c]) {
      Unit& unit = units_[static_cast<size_t>(unit_of_[static_cast<size_t>(item.tensor)])];
      if (unit.sample_lines++ == 0) unit.first_sample = sample_lines_;
      ++sample_lines_;
      items_.push_back(item);
    }
  }
}

template <class Elements>
DevicePlan::Listed DevicePlan::list_each(const std::vector<int>& tensors, Elements elements) {
  Listed out{items_.size(), 0};
  for (const int t : tensors) {
    const int64_t each = elements(t);
    const int64_t parts = (tensors_[static_cast<size_t>(t)].numel + each - 1) / each;
    for (int64_t part = 0; part < parts; ++part) items_.push_back({t, static_cast<int32_t>(part)});
  }
  out.count = static_cast<int>(items_.size() - out.first);
  return out;
}

DevicePlan::Listed DevicePlan::list(const std::vector<int>& tensors, int64_t elements) {
  return list_each(tensors, [elements](int) { return elements; });
}

// Pieces for warps, and where everything lies.
void DevicePlan::cut() {
  const size_t n = tensors_.size();
  std::vector<int> all;
  int64_t partials = 0;
  for (size_t t = 0; t < n; ++t) {
    // Rows' sums make up the Euclidean norm, too.
    if (row_cut_of_[t] < 0 || settings_.norm_type != 2.0) all.push_back(static_cast<int>(t));
    partial_first_.push_back(partials);
    partials += (tensors_[t].numel + kPassElements - 1) / kPassElements;
  }
  reduce_ = list_each(all, [this](int t) {
    const int group = 16 / itemsize(tensors_[static_cast<size_t>(t)].grad_dtype);
    return int64_t{kFoldElements} * teams_of(group);
  });
  for (const Class& c : classes_) {
    const RuleFacts& rule = facts(c.rule);
    const int64_t row = int64_t{kRow} * teams_of(c.access);
    Cut out{};
    out.apply_rows = kRows;
    if (rule.stages > 0) out.source = list(c.tensors, row * kRows);
    if (rule.sends_signs) {
      out.apply = out.source;
      out.signs = sign_words_;
      sign_words_ += int64_t{out.source.count} * kRows * (c.access == kMixed ? 8 : 4);
    } else if (rule.applies) {
      // Small models are cut finer, until every multiprocessor has some warps.
      int64_t elements = 0;
      for (const int t : c.tensors) elements += tensors_[static_cast<size_t>(t)].numel;
      while (out.apply_rows > 8 &&
             elements < row * out.apply_rows * kWarps * settings_.multiprocessors)
        out.apply_rows /= 2;
      out.apply = list(c.tensors, row * out.apply_rows);
    }
    if (rule.selections > 0)
      out.select =
          list(c.tensors, settings_.select.scope == SelectScope::block ? settings_.select.block
                                                                       : kSelectPiece);
    cuts_.push_back(out);
  }
  cut_rows();
  cut_units();
  if (settings_.select.kind == Selector::top_k && settings_.select.scope != SelectScope::block)
    list_sample();
  const size_t units = n + static_cast<size_t>(groups_) + 1;
  at_.entries = place(n * sizeof(Entry));
  at_.layouts = place(layouts_.size() * sizeof(Layout));
  at_.group_first = place((static_cast<size_t>(groups_) + 1) * sizeof(int32_t));
  at_.partial_first = place(n * sizeof(int64_t));
  at_.items = place(items_.size() * sizeof(Item));
  at_.started = place(n * sizeof(int32_t));
  at_.status = place(sizeof(Status));
  at_.arrived = place((n + 1) * sizeof(uint32_t));
  at_.nonfinite = place(3 * n * sizeof(uint32_t));
  at_.cuts = place(row_cuts_.size() * sizeof(RowCut));
  at_.units = place(units_.size() * sizeof(Unit));
  at_.unit_arrived = place(units_.size() * sizeof(uint32_t));
  at_.image = bytes_;
  at_.partial = place(static_cast<size_t>(partials) * sizeof(double));
  at_.value = place(n * sizeof(double));
  at_.norms = place(units * sizeof(double));
  at_.coefs = place(n * sizeof(double));
  at_.norm_sq = place(2 * n * sizeof(double));
  at_.unit_sum = place(2 * units * sizeof(double));
  at_.scalars = place(n * sizeof(Scalars));
  at_.prepared = place(n * sizeof(Prepared));
  at_.signs = place(static_cast<size_t>(sign_words_) * sizeof(uint32_t));
  const auto doubles = [this](int64_t count) {
    return place(static_cast<size_t>(count) * sizeof(double));
  };
  const int64_t stats = row_chunks_ + static_cast<int64_t>(row_cuts_.size());
  at_.row_sums = doubles(2 * row_sums_);
  at_.row_coefs = place(static_cast<size_t>(row_coef_bytes_));
  at_.row_total = doubles(stats);
  at_.row_clipped = doubles(stats);
  at_.row_least = doubles(stats);
  at_.samples = place(static_cast<size_t>(sample_lines_) * kSampleLine * sizeof(uint64_t));
  at_.histogram = place(units_.size() * kDigits * sizeof(uint64_t));
  at_.candidates = place(static_cast<size_t>(candidates_) * sizeof(Candidate));
  at_.marks = place(static_cast<size_t>(mark_words_) * sizeof(uint32_t));
}

size_t DevicePlan::place(size_t bytes) {
  constexpr size_t kLine = 128;
  const size_t at = bytes_;
  bytes_ += (bytes + kLine - 1) / kLine * kLine;
  return at;
}

Entry DevicePlan::entry(size_t t) const {
  const Tensor& tensor = tensors_[t];
  const RuleFacts& rule = facts(tensor.rule);
  Entry out{};
  out.operand[0] = tensor.param;
  out.dtype[0] = static_cast<uint8_t>(tensor.param_dtype);
  out.dtype[1] = static_cast<uint8_t>(tensor.grad_dtype);
  const int companion = has_companion(tensor.storage) ? 1 : 0;
  for (int k = 0; k < rule.states + companion; ++k) {
    out.operand[2 + k] = tensor.state[k];
    out.dtype[2 + k] = static_cast<uint8_t>(tensor.state_dtype[k]);
    if (k < rule.states && tensor.state_dtype[k] == DType::bf16)
      out.stochastic = static_cast<uint8_t>(out.stochastic | 4u << k);
  }
  out.storage = static_cast<uint8_t>(tensor.storage);
  if (tensor.storage == ParamStorage::stochastic)
    out.stochastic = static_cast<uint8_t>(out.stochastic | 1u);
  if (tensor.storage == ParamStorage::master) {  // the rule's parameter is the master
    std::swap(out.operand[0], out.operand[2 + rule.states]);
    std::swap(out.dtype[0], out.dtype[2 + rule.states]);
  }
  out.steps = tensor.steps;
  out.norm_sq = tensor.norm_sq;
  out.scale = tensor.scale;
  out.numel = tensor.numel;
  out.rule = tensor.rule;
  out.group = tensor.group;
  out.layout = layout_of_[t];
  out.grad_layout = grad_layout_of_[t];
  out.cut = row_cut_of_[t];
  out.unit = unit_of_[t];
  out.select_first = select_first_[t];
  out.first_mark = first_mark_[t];
  out.kernels = class_of_[t];
  return out;
}

std::vector<char> DevicePlan::image() const {
  std::vector<char> out(at_.image, 0);
  std::vector<Entry> entries;
  std::vector<int32_t> started, group_first(static_cast<size_t>(groups_) + 1, 0);
  for (size_t t = 0; t < tensors_.size(); ++t) {
    entries.push_back(entry(t));
    started.push_back(tensors_[t].first ? 0 : 1);
    ++group_first[static_cast<size_t>(tensors_[t].group) + 1];
  }
  for (size_t g = 0; g < static_cast<size_t>(groups_); ++g) group_first[g + 1] += group_first[g];
  write(&out, at_.entries, entries);
  write(&out, at_.layouts, layouts_);
  write(&out, at_.group_first, group_first);
  write(&out, at_.partial_first, partial_first_);
  write(&out, at_.items, items_);
  write(&out, at_.started, started);
  write(&out, at_.cuts, row_cuts_);
  write(&out, at_.units, units_);
  return out;
}

size_t DevicePlan::input_bytes() const {
  return tensors_.size() * sizeof(void*) + static_cast<size_t>(groups_) * sizeof(GroupInput) +
         sizeof(StepInput);
}

std::vector<char> DevicePlan::inputs(const void* const* grads, const GroupInput* groups,
                                     const StepInput& step) const {
  for (const Tensor& tensor : tensors_)
    if ((tensor.rows != nullptr) != (groups[tensor.group].clip.mode == ClipMode::agc))
      throw std::invalid_argument("the plan does not say which tensors are clipped by rows");
  std::vector<char> out(input_bytes());
  char* at = out.data();
  const auto append = [&at](const void* from, size_t bytes) {
    std::memcpy(at, from, bytes);
    at += bytes;
  };
  if (!tensors_.empty()) append(grads, tensors_.size() * sizeof(void*));
  append(groups, static_cast<size_t>(groups_) * sizeof(GroupInput));
  append(&step, sizeof(step));
  return out;
}

bool DevicePlan::reduces(const GroupInput* groups) const {
  return settings_.always_norm || accumulates_ || asks_first(settings_.policy) ||
         std::any_of(groups, groups + groups_,
                     [](const GroupInput& g) { return g.clip.needs_norm(); });
}

size_t DevicePlan::units() const {
  return settings_.scope == Scope::global  ? 1
         : settings_.scope == Scope::group ? static_cast<size_t>(groups_)
                                           : tensors_.size();
}

View DevicePlan::view(void* device, const void* inputs, const GroupInput* groups) const {
  char* const base = static_cast<char*>(device);
  const char* const in = static_cast<const char*>(inputs);
  const size_t n = tensors_.size();
  View v{};
  const auto at = [base](size_t offset, auto** out) {
    *out = reinterpret_cast<std::remove_reference_t<decltype(**out)>*>(base + offset);
  };
  at(at_.entries, &v.entries);
  at(at_.layouts, &v.layouts);
  at(at_.group_first, &v.group_first);
  at(at_.partial_first, &v.partial_first);
  v.grads = reinterpret_cast<const void* const*>(in);
  v.inputs = reinterpret_cast<const GroupInput*>(in + n * sizeof(void*));
  v.step = reinterpret_cast<const StepInput*>(v.inputs + groups_);
  at(at_.partial, &v.partial);
  at(at_.value, &v.value);
  at(at_.nonfinite, &v.nonfinite);
  at(at_.arrived, &v.arrived);
  at(at_.norms, &v.norms);
  at(at_.coefs, &v.coefs);
  at(at_.norm_sq, &v.norm_sq);
  at(at_.unit_sum, &v.unit_sum);
  at(at_.started, &v.started);
  at(at_.scalars, &v.scalars);
  at(at_.prepared, &v.prepared);
  at(at_.signs, &v.signs);
  at(at_.status, &v.status);
  at(at_.cuts, &v.cuts);
  at(at_.row_sums, &v.row_sums);
  at(at_.row_coefs, &v.row_coefs);
  at(at_.row_total, &v.row_total);
  at(at_.row_clipped, &v.row_clipped);
  at(at_.row_least, &v.row_least);
  v.row_sum_count = row_sums_;
  v.row_chunks = row_chunks_;
  at(at_.units, &v.units);
  at(at_.unit_arrived, &v.unit_arrived);
  at(at_.samples, &v.samples);
  at(at_.histogram, &v.histogram);
  at(at_.candidates, &v.candidates);
  at(at_.marks, &v.marks);
  v.select = settings_.select;
  v.norm_type = settings_.norm_type;
  v.tensors = static_cast<int32_t>(n);
  v.groups = groups_;
  v.scope = settings_.scope;
  std::copy_n(settings_.stage_scope, kMaxStages, v.stage_scope);
  v.policy = settings_.policy;
  v.reduces = reduces(groups);
  v.accumulates = accumulates_;
  v.skip_unit_coef = settings_.skip_unit_coef;
  return v;
}

std::vector<Launch> DevicePlan::launches(void* device, const GroupInput* groups, Part part) const {
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
  if (reduces(groups) && part != Part::rest)
    add(table.reduce[static_cast<int>(reduction_of(settings_.norm_type))], reduce_, 0, 0);
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
      add(table.source[classes_[c].rule][stage][classes_[c].access], cuts_[c].source, kRows, stage);
      out.back().work.first = cuts_[c].signs;
      blocks += out.back().blocks;
    }
    for (size_t i = first; i < out.size(); ++i) out[i].work.blocks = blocks;
    if (out.size() > first) prepare(stage);
    if (!selected_from) continue;
    if (filters)
      for (int digit = 0; digit < digits_; ++digit)
        selecting(table.narrow, stage, kSelectPiece, digit);
    if (by_blocks)
      selecting(table.select_block, stage, spec.block, 0);
    else
      selecting(table.selected, stage, kSelectPiece, 0);
  }
  for (size_t c = 0; c < classes_.size(); ++c) {
    if (!facts(classes_[c].rule).applies || cuts_[c].apply.count == 0) continue;
    add(table.apply[classes_[c].rule][classes_[c].access], cuts_[c].apply, cuts_[c].apply_rows, 0);
    out.back().work.first = cuts_[c].signs;
  }
  return out;
}

}  // namespace pysmooth::cuda

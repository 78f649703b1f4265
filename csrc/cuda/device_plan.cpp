#include "cuda/device_plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/chunks.h"
#include "cuda/facts.h"
#include "cuda/kernels.h"
#include "cuda/pieces.h"

namespace pysmooth::cuda {
namespace {

constexpr int64_t kDirect = 4096;    // a unit of so few elements is selected from as a whole
constexpr int64_t kMostLines = 256;  // of a unit's sample

Access access_of(const Tensor& tensor) {
  if (tensor.param_dtype == DType::f64) return kWide;
  bool plain = tensor.param_dtype == DType::f32;
  if (facts(tensor.rule).reads_grad) plain = plain && tensor.grad_dtype == DType::f32;
  for (int k = 0; k < facts(tensor.rule).states; ++k)
    plain = plain && tensor.state_dtype[k] == DType::f32;
  return plain ? kPlain : kMixed;
}

}  // namespace

DevicePlan::DevicePlan(const std::vector<Tensor>& tensors, int groups, const Settings& settings)
    : tensors_(tensors), groups_(groups), settings_(settings) {
  if (scales_blocks() && (settings.select.block < 1 || kChunk % settings.select.block != 0))
    throw std::invalid_argument("blocks that do not divide " + std::to_string(kChunk));
  if (settings_.spread && (settings_.sites > 1 || settings_.absorbs))
    throw std::invalid_argument("parts of tensors lie on one device, and are not absorbed");
  if (settings_.sites > 1 && settings_.absorbs)
    throw std::invalid_argument("gradients of tensors on several devices are not absorbed");
  for (size_t t = 0; t < tensors_.size(); ++t) {
    const Tensor& tensor = tensors_[t];
    if (settings_.absorbs && !facts(tensor.rule).absorbs)
      throw std::invalid_argument("rule '" + std::string(facts(tensor.rule).name) +
                                  "' does not absorb gradients");
    if (scales_blocks() && facts(tensor.rule).stages > 0 && facts(tensor.rule).scales == 0)
      throw std::invalid_argument("rule '" + std::string(facts(tensor.rule).name) +
                                  "' has no scales of blocks");
    // Of parts: other processes may accumulate a norm that nothing here has begun.
    accumulates_ = accumulates_ || tensor.norm_sq != nullptr ||
                   (settings_.spread && facts(tensor.rule).accumulates);
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
    if (!is_mine(t)) continue;  // it has a place for what its device will tell
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

// Blocks of consecutive elements that compressors scale by themselves.
void DevicePlan::cut_blocks() {
  std::vector<int> tensors;
  for (size_t t = 0; t < tensors_.size(); ++t) {
    first_block_.push_back(block_count_);
    if (!scales_blocks() || facts(tensors_[t].rule).scales == 0 || !is_mine(t)) continue;
    tensors.push_back(static_cast<int>(t));
    block_count_ += (tensors_[t].numel + settings_.select.block - 1) / settings_.select.block;
  }
  blocks_ = list(tensors, settings_.select.block * kBlocksOfWarp);
}

int64_t DevicePlan::pass_run() const {
  return scales_blocks() ? std::min<int64_t>(settings_.select.block, kPassElements) : kPassElements;
}

// Units of the selection. Room for candidates: twice as many as are wanted, and some per cent.
void DevicePlan::cut_units() {
  const SelectSpec& spec = settings_.select;
  const bool together = spec.kind == Selector::top_k && spec.scope == SelectScope::global;
  if (together && settings_.sites > 1)
    throw std::invalid_argument("the largest of tensors on several devices are not selected");
  int64_t first = 0;
  for (size_t t = 0; t < tensors_.size(); ++t) {
    const Tensor& tensor = tensors_[t];
    const auto index = static_cast<int32_t>(t);
    const RuleFacts& rule = facts(tensor.rule);
    const bool selects = rule.selections > 0 && spec.kind != Selector::none && is_mine(t);
    if (selects && selections_ != 0 && selections_ != rule.selections)
      throw std::invalid_argument("rules that select once and rules that mark in one plan");
    if (selects) selections_ = rule.selections;
    first_mark_.push_back(selects && rule.marks ? mark_words_ : -1);
    if (selects && rule.marks) mark_words_ += (tensor.numel + 31) / 32 * kMaxSelections;
    const bool jointly = selects && tensor.first_element >= 0;
    if (!together) first = jointly ? tensor.first_element : 0;
    select_first_.push_back(first);
    if (selects && (!together || units_.empty())) {
      Unit unit{};
      unit.first_tensor = index;
      unit.jointly = jointly ? 1 : 0;
      units_.push_back(unit);
    }
    unit_of_.push_back(selects ? static_cast<int32_t>(units_.size()) - 1 : -1);
    if (!selects) continue;
    Unit& unit = units_.back();
    unit.last_tensor = index + 1;
    unit.elements += jointly ? tensor.elements : tensor.numel;
    if (tensor.param_dtype == DType::f64) unit.wide = 1;
    first += tensor.numel;
  }
  for (Unit& unit : units_) {
    while (unit.elements >> unit.place_bits != 0) ++unit.place_bits;
    unit.first_candidate = candidates_;
    unit.room = unit.jointly != 0 ? 0
                                  : std::min(unit.elements, 2 * spec.chosen_of(unit.elements) +
                                                                unit.elements / 32 + kDirect);
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
    if (unit.elements <= kDirect || unit.jointly != 0) continue;
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
    if (!is_mine(static_cast<size_t>(t))) continue;
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
    if (is_mine(t)) partials += (tensors_[t].numel + pass_run() - 1) / pass_run();
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
      int64_t elements = 0;
      for (const int t : c.tensors)
        if (is_mine(static_cast<size_t>(t))) elements += tensors_[static_cast<size_t>(t)].numel;
      out.apply_rows = rows_for(elements, c.access, settings_.multiprocessors);
      out.apply = list(c.tensors, row * out.apply_rows);
    }
    if (rule.selections > 0)
      out.select =
          list(c.tensors, settings_.select.scope == SelectScope::block ? settings_.select.block
                                                                       : kSelectPiece);
    cuts_.push_back(out);
  }
  cut_rows();
  cut_blocks();
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
  at_.taken = place(settings_.absorbs ? n * sizeof(int64_t) : 0);
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
  at_.incoming = place(settings_.absorbs ? n * sizeof(void*) : 0);
  at_.block_scales = place(static_cast<size_t>(block_count_) * kBlockBytes);
  at_.board = place(static_cast<size_t>(settings_.sites) * board_row_bytes());
  at_.parts = place(settings_.spread ? n * sizeof(PartSum) : 0);
  at_.joined = place(settings_.joins ? joined_count() * sizeof(double) : 0);
}

size_t DevicePlan::place(size_t bytes) {
  constexpr size_t kLine = 128;
  const size_t at = bytes_;
  bytes_ += (bytes + kLine - 1) / kLine * kLine;
  return at;
}

}  // namespace pysmooth::cuda

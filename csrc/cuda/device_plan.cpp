#include "cuda/device_plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cuda/kernels.h"

namespace pysmooth::cuda {
namespace {

constexpr int kRows = kPassElements / kRow;

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

Reduction reduction_of(double norm_type) {
  if (norm_type == 2.0) return Reduction::sum_squares;
  if (norm_type == 1.0) return Reduction::sum_abs;
  if (norm_type == 0.0) return Reduction::count_nonzero;
  if (std::isinf(norm_type)) return norm_type > 0 ? Reduction::max_abs : Reduction::min_abs;
  return Reduction::sum_power;
}

template <class T>
void write(std::vector<char>* image, size_t at, const std::vector<T>& values) {
  if (!values.empty()) std::memcpy(image->data() + at, values.data(), sizeof(T) * values.size());
}

int blocks_for(int warps) { return std::max(1, (warps + kWarps - 1) / kWarps); }

}  // namespace

DevicePlan::DevicePlan(const std::vector<Tensor>& tensors, int groups, const Settings& settings)
    : tensors_(tensors), groups_(groups), settings_(settings) {
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
    const Access access = access_of(tensor);
    auto found = std::find_if(classes_.begin(), classes_.end(), [&](const Class& c) {
      return c.rule == tensor.rule && c.access == access;
    });
    if (found == classes_.end()) found = classes_.insert(classes_.end(), {tensor.rule, access, {}});
    found->tensors.push_back(static_cast<int>(t));
  }
  cut();
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
    all.push_back(static_cast<int>(t));
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
    cuts_.push_back(out);
  }
  const size_t units = n + static_cast<size_t>(groups_) + 1;
  at_.entries = place(n * sizeof(Entry));
  at_.layouts = place(layouts_.size() * sizeof(Layout));
  at_.group_first = place((static_cast<size_t>(groups_) + 1) * sizeof(int32_t));
  at_.partial_first = place(n * sizeof(int64_t));
  at_.items = place(items_.size() * sizeof(Item));
  at_.started = place(n * sizeof(int32_t));
  at_.status = place(sizeof(Status));
  at_.arrived = place((n + 1) * sizeof(uint32_t));
  at_.nonfinite = place(2 * n * sizeof(uint32_t));
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
  for (int k = 0; k < rule.states; ++k) {
    out.operand[2 + k] = tensor.state[k];
    out.dtype[2 + k] = static_cast<uint8_t>(tensor.state_dtype[k]);
    if (tensor.state_dtype[k] == DType::bf16)
      out.stochastic = static_cast<uint8_t>(out.stochastic | 4u << k);
  }
  out.steps = tensor.steps;
  out.norm_sq = tensor.norm_sq;
  out.scale = tensor.scale;
  out.numel = tensor.numel;
  out.rule = tensor.rule;
  out.group = tensor.group;
  out.layout = layout_of_[t];
  out.grad_layout = grad_layout_of_[t];
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
  return out;
}

size_t DevicePlan::input_bytes() const {
  return tensors_.size() * sizeof(void*) + static_cast<size_t>(groups_) * sizeof(GroupInput) +
         sizeof(StepInput);
}

std::vector<char> DevicePlan::inputs(const void* const* grads, const GroupInput* groups,
                                     const StepInput& step) const {
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

std::vector<Launch> DevicePlan::launches(void* device, const GroupInput* groups) const {
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
  if (reduces(groups))
    add(table.reduce[static_cast<int>(reduction_of(settings_.norm_type))], reduce_, 0, 0);
  prepare(-1);
  for (int stage = 0; stage < kMaxStages; ++stage) {
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
  }
  for (size_t c = 0; c < classes_.size(); ++c) {
    if (!facts(classes_[c].rule).applies || cuts_[c].apply.count == 0) continue;
    add(table.apply[classes_[c].rule][classes_[c].access], cuts_[c].apply, cuts_[c].apply_rows, 0);
    out.back().work.first = cuts_[c].signs;
  }
  return out;
}

}  // namespace pysmooth::cuda

// What a plan's memory begins with, what a step sends, and where kernels find both.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "cuda/device_plan.h"
#include "cuda/facts.h"
#include "cuda/kernels.h"

namespace pysmooth::cuda {
namespace {

template <class T>
void write(std::vector<char>* image, size_t at, const std::vector<T>& values) {
  if (!values.empty()) std::memcpy(image->data() + at, values.data(), sizeof(T) * values.size());
}

}  // namespace

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
  out.elements = settings_.spread ? tensor.elements : tensor.numel;
  out.counted = settings_.spread && tensor.counted ? 1 : 0;
  out.rule = tensor.rule;
  out.group = tensor.group;
  out.layout = layout_of_[t];
  out.grad_layout = grad_layout_of_[t];
  out.cut = row_cut_of_[t];
  out.unit = unit_of_[t];
  out.select_first = select_first_[t];
  out.first_mark = first_mark_[t];
  out.first_block = first_block_[t];
  out.kernels = class_of_[t];
  out.site = tensor.site;
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
  if (settings_.absorbs) {
    std::vector<int64_t> taken;
    for (const Tensor& tensor : tensors_) taken.push_back(tensor.absorbed);
    write(&out, at_.taken, taken);
  }
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
  at(at_.taken, &v.taken);
  at(at_.incoming, &v.incoming);
  at(at_.block_scales, &v.block_scales);
  if (settings_.sites > 1) at(at_.board, &v.board);
  if (settings_.spread) at(at_.parts, &v.parts);
  if (settings_.joins) at(at_.joined, &v.joined);
  v.site = settings_.site;
  v.block_run = static_cast<int32_t>(pass_run());
  while (settings_.select.block >> v.block_shift > 1) ++v.block_shift;
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
  v.absorbs = settings_.absorbs;
  return v;
}

View DevicePlan::absorbing_view(void* device) const {
  View v = view(device, nullptr, nullptr);
  v.grads = v.incoming;
  v.inputs = nullptr;
  v.step = nullptr;
  return v;
}

}  // namespace pysmooth::cuda

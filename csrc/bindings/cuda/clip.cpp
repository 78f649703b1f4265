#include "bindings/cuda/clip.h"

#include <algorithm>

#include "bindings/aliasing.h"
#include "bindings/cuda/plan.h"

namespace pysmooth::cuda {
namespace {

std::string name_of(size_t t) { return "gradient " + std::to_string(t); }

// Of gradient `t`; its strides stay valid until the next one is read.
DLTensor read(const py::list& grads, size_t t) {
  DLTensor d;
  shared_reader().read(PyList_GET_ITEM(grads.ptr(), static_cast<Py_ssize_t>(t)), &d,
                       [t] { return name_of(t); });
  return d;
}

}  // namespace

ClipPlan::ClipPlan(const py::list& grads, double norm_type, const std::vector<int>& sites)
    : forms_(grads.size()), tensors_(grads.size()), addresses_(grads.size()) {
  const int scale = find_rule("scale");
  std::vector<int> devices;
  for (size_t t = 0; t < forms_.size(); ++t) {
    const DLTensor d = read(grads, t);
    const auto site = static_cast<size_t>(sites.at(t));
    devices.resize(std::max(devices.size(), site + 1), d.device.device_id);
    forms_[t].assign(d);
    const RealView view = RealView::of(forms_[t], name_of(t));
    Tensor& out = tensors_[t];
    out.rule = scale;
    out.site = sites[t];
    out.numel = view.numel;
    out.param_dtype = out.grad_dtype = view.dtype;
    wide_ = wide_ || view.dtype == DType::f64;
    const auto merged = [&](const std::vector<const int64_t*>& strides) -> const Layout* {
      Layout layout;
      if (!merge_layout(static_cast<int>(view.shape.size()), view.shape.data(), strides, &layout))
        throw py::value_error(name_of(t) + " has more than " + std::to_string(kMaxDims) +
                              " dimensions that cannot be merged");
      return layout.linear() ? nullptr : &layouts_.emplace_back(layout);
    };
    out.layout = merged({view.strides.data(), view.strides.data()});
    out.grad_layout = merged({view.strides.data()});
  }
  Settings settings;
  settings.norm_type = norm_type;
  settings.always_norm = settings.skip_unit_coef = true;
  if (devices.empty()) devices.push_back(0);
  sites_ = make_sites(tensors_, 1, settings, devices);
}

bool ClipPlan::begin(const py::list& grads, bool writes) {
  if (grads.size() != forms_.size()) return false;
  for (size_t t = 0; t < forms_.size(); ++t) {
    const DLTensor d = read(grads, t);
    const Site& site = sites_[static_cast<size_t>(tensors_[t].site)];
    if (d.device.device_id != site.device() || !forms_[t].same_form(d)) return false;
    addresses_[t] = d.data;
  }
  if (writes)
    check_scalable(
        forms_.size(),
        [this](size_t t) {
          const Tensor& x = tensors_[t];
          return Scaled{addresses_[t], x.numel, x.grad_dtype, x.grad_layout == nullptr};
        },
        [this](size_t t) { return RealView::of(forms_[t], name_of(t)); });
  return true;
}

int ClipPlan::run(size_t site, int phase, double max_norm, Part part, uintptr_t inputs,
                  uintptr_t stream) {
  GroupInput group{};
  group.hyper[0] = 1.0;
  group.clip = {ClipMode::hard, max_norm, 1e-6, 0.0, 0.0};  // torch's
  group.clip_value = -1.0;
  StepInput numbers{};
  numbers.unscale = 1.0;
  const Site& here = sites_.at(site);
  check(cuda::step(here.plan(), here.memory(), reinterpret_cast<void*>(inputs), addresses_.data(),
                   &group, numbers, reinterpret_cast<void*>(stream), part, phase),
        "launch");
  return sites_.size() == 1 ? 1 : here.plan().phases(&group, part);
}

}  // namespace pysmooth::cuda

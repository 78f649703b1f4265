#include "bindings/plan.h"

#include <algorithm>

#include "bindings/aliasing.h"
#include "bindings/run_released.h"
#include "bindings/select_spec.h"

namespace pysmooth {

int find_rule(const std::string& name) {
  for (int i = 0; i < kernels().rule_count; ++i)
    if (name == kernels().rules[i].name) return i;
  throw py::value_error("rule '" + name + "' is not known to the cpu backend");
}

Plan::Plan(const py::list& params, const py::list& state_dicts, const py::list& state_keys,
           const std::vector<std::string>& rules, const std::vector<int>& groups,
           std::vector<std::string> names, const std::vector<bool>& first,
           const py::list& state_roots, int scope, int policy, double norm_type,
           const std::vector<int>& stage_scopes, const py::object& select,
           const std::vector<int>& low_states, const std::vector<int>& param_storage,
           const std::vector<bool>& by_rows, const py::list& sums, bool absorbs)
    : params_(params),
      state_dicts_(state_dicts),
      state_keys_(state_keys),
      state_roots_(state_roots),
      sums_(sums),
      names_(std::move(names)),
      entries_(params.size()),
      grads_(params.size()),
      states_there_(params.size()),
      left_(params.size()) {
  const size_t n = params.size();
  if (state_dicts.size() != n || state_keys.size() != n || rules.size() != n ||
      groups.size() != n || names_.size() != n || first.size() != n || low_states.size() != n ||
      param_storage.size() != n || by_rows.size() != n || sums.size() != n)
    throw py::value_error("Plan: all lists must be as long as params");
  pipeline_.slots.resize(n);
  pipeline_.scope = static_cast<Scope>(scope);
  pipeline_.policy = static_cast<NonFinite>(policy);
  pipeline_.norm_type = norm_type;
  pipeline_.absorbs = absorbs;
  for (size_t i = 0; i < stage_scopes.size() && i < kMaxStages; ++i)
    pipeline_.stage_scope[i] = static_cast<Scope>(stage_scopes[i]);
  if (!select.is_none()) pipeline_.select = read_select(select);
  for (size_t t = 0; t < n; ++t) {
    Entry& e = entries_[t];
    Slot& slot = pipeline_.slots[t];
    param_list_.push_back(params_[t].ptr());
    PyObject* const param = param_list_.back();
    e.state_dict = state_dicts_[t].ptr();
    if (!sums_[t].is_none()) e.sums = py::cast<BackwardSums*>(sums_[t]);
    if (!PyDict_Check(e.state_dict)) throw py::type_error("Plan: state_dicts must hold dicts");
    const auto name = [&] { return what("parameter", t); };
    DLTensor d;
    shared_reader().read(param, &d, name);
    e.tracked = static_cast<uint32_t>(tracked_.size());
    tracked_.push_back(track(param, d));
    RealView& view = shapes_.emplace_back().view;
    view = RealView::of(*tracked_.back().form, name());
    if (has_lazy_bits(param))
      throw py::value_error(name() +
                            " has its conjugate or negative bit set; pass a resolved copy");
    if (overlaps_itself(static_cast<int>(view.shape.size()), view.shape.data(),
                        view.strides.data()))
      throw py::value_error(name() + " overlaps itself in memory (an expanded tensor?)");
    slot.rule = find_rule(rules[t]);
    slot.group = groups[t];
    if (slot.group < 0) throw py::value_error("Plan: groups must not be negative");
    if (static_cast<size_t>(slot.group) >= group_sizes_.size())
      group_sizes_.resize(static_cast<size_t>(slot.group) + 1, 0);
    ++group_sizes_[static_cast<size_t>(slot.group)];
    slot.numel = slot.elements = view.numel;
    slot.param_dtype = view.dtype;
    slot.param = d.data;
    slot.first = first[t];
    if (by_rows[t]) {
      shapes_[t].rows = std::make_unique<RowCut>();
      shapes_[t].rows->of_param(view, d.ndim, d.data, name());
      slot.rows = &shapes_[t].rows->shape;
    }
    read_storage(t, param_storage[t]);
    read_states(t, py::reinterpret_borrow<py::tuple>(state_keys_[t]), low_states[t]);
    if (absorbs) learn_own_layout(t);
  }
  check_aliasing();
  pipeline_.groups.resize(group_sizes_.size());
  pipeline_.cut_chunks();
}

// States that are one number: the accumulated norm, the scale, the step count, of those that the
// rule has. `index` counts them.
void Plan::read_number(size_t t, int index, const RealView& view, void* data,
                       const std::string& name) {
  Slot& slot = pipeline_.slots[t];
  const RuleInfo& rule = kernels().rules[slot.rule];
  const bool norm = rule.accumulates && index == 0;
  const bool scale = rule.keeps_scale && index == (rule.accumulates ? 1 : 0);
  const DType wanted = norm || scale ? DType::f64 : DType::f32;
  if (view.dtype != wanted || !view.shape.empty())
    throw py::value_error(name + " is not a " + dtype_name(wanted) + " tensor of shape ()");
  if (norm) {
    slot.norm_sq = static_cast<double*>(data);
    pipeline_.accumulates = true;
  } else if (scale) {
    slot.scale = static_cast<double*>(data);
  } else {
    slot.steps = static_cast<float*>(data);
  }
}

void Plan::read_storage(size_t t, int storage) {
  Slot& slot = pipeline_.slots[t];
  slot.storage = static_cast<ParamStorage>(storage);
  const bool fits = slot.storage == ParamStorage::plain || slot.param_dtype == DType::bf16 ||
                    (slot.param_dtype == DType::f16 && slot.storage != ParamStorage::stochastic);
  if (storage < 0 || storage > static_cast<int>(ParamStorage::stochastic) || !fits)
    throw py::value_error("Plan: param_storage " + std::to_string(storage) +
                          " does not go with a " + dtype_name(slot.param_dtype) + " parameter");
}

int Plan::tensor_states(size_t t) const {
  const Slot& slot = pipeline_.slots[t];
  return kernels().rules[slot.rule].states + (has_companion(slot.storage) ? 1 : 0);
}

// A slot's states are either all there or, for a parameter that never had a gradient, all missing.
void Plan::read_states(size_t t, const py::tuple& keys, int low) {
  Entry& e = entries_[t];
  Slot& slot = pipeline_.slots[t];
  const RuleInfo& rule = kernels().rules[slot.rule];
  if ((static_cast<unsigned>(low) & ~rule.low_states) != 0)
    throw py::value_error("rule '" + std::string(rule.name) + "' does not take bfloat16 states");
  const int tensors = tensor_states(t);
  const bool counts = rule.counts_steps || slot.storage == ParamStorage::stochastic;
  const int expected =
      tensors + (rule.accumulates ? 1 : 0) + (rule.keeps_scale ? 1 : 0) + (counts ? 1 : 0);
  if (static_cast<int>(keys.size()) != expected)
    throw py::value_error("rule '" + std::string(rule.name) + "' has " + std::to_string(expected) +
                          " states, not " + std::to_string(keys.size()));
  e.expected_states = static_cast<int16_t>(expected);
  most_states_ = std::max(most_states_, expected);
  e.keys = &PyTuple_GET_ITEM(keys.ptr(), 0);
  for (const py::handle key : keys) {
    PyObject* const state = PyDict_GetItemWithError(e.state_dict, key.ptr());
    if (state == nullptr || state == Py_None) {
      e.states_held = 0;
      slot.norm_sq = nullptr;
      tracked_.resize(e.tracked + 1);
      return;
    }
    const auto name = [&] {
      return "state '" + py::cast<std::string>(key) + "' of " + what("parameter", t);
    };
    DLTensor d;
    shared_reader().read(state, &d, name);
    tracked_.push_back(track(state, d));
    const RealView view = RealView::of(*tracked_.back().form, name());
    if (e.states_held >= tensors) {
      read_number(t, e.states_held - tensors, view, d.data, name());
      ++e.states_held;
      continue;
    }
    if (view.shape != shapes_[t].view.shape)
      throw py::value_error(name() + " does not have the parameter's shape");
    const bool rests = e.states_held == rule.states && slot.storage == ParamStorage::kahan;
    const DType wanted = rests                             ? slot.param_dtype
                         : slot.param_dtype == DType::f64  ? DType::f64
                         : (low >> e.states_held & 1) != 0 ? DType::bf16
                                                           : DType::f32;
    if (view.dtype != wanted)
      throw py::value_error(name() + " has dtype " + dtype_name(view.dtype) + ", expected " +
                            dtype_name(wanted));
    if (has_lazy_bits(state))
      throw py::value_error(name() + " has its conjugate or negative bit set");
    if (overlaps_itself(static_cast<int>(view.shape.size()), view.shape.data(),
                        view.strides.data()))
      throw py::value_error(name() + " overlaps itself in memory (an expanded tensor?)");
    slot.state_dtype[e.states_held] = wanted;
    slot.state[e.states_held++] = d.data;
  }
}

void Plan::check_aliasing() {
  std::vector<Region> regions;
  std::deque<RealView> views;
  std::vector<std::string> labels;
  for (size_t t = 0; t < entries_.size(); ++t) {
    const Entry& e = entries_[t];
    regions.push_back(
        Region::of(known(e, 0).data, shapes_[t].view, static_cast<int>(labels.size())));
    labels.push_back(what("parameter", t));
    for (int k = 1; k <= e.states_held; ++k) {
      views.push_back(RealView::of(*known(e, k).form, "state"));
      regions.push_back(
          Region::of(known(e, k).data, views.back(), static_cast<int>(labels.size())));
      labels.push_back("a state of " + what("parameter", t));
    }
  }
  const auto [a, b] = find_alias(std::move(regions));
  if (a >= 0)
    throw py::value_error(labels[static_cast<size_t>(a)] + " and " +
                          labels[static_cast<size_t>(b)] + " share memory");
}

// The strides of all that is walked together; `states` keeps them alive.
std::vector<const int64_t*> Plan::walked(size_t t, const int64_t* grad,
                                         std::deque<RealView>* states) const {
  std::vector<const int64_t*> strides{shapes_[t].view.strides.data(), grad};
  const Entry& e = entries_[t];
  for (int k = 1; k <= e.states_held && k <= tensor_states(t); ++k) {
    states->push_back(RealView::of(*known(e, k).form, "state"));
    strides.push_back(states->back().strides.data());
  }
  if (pipeline_.slots[t].storage == ParamStorage::master)
    std::swap(strides.front(), strides.back());
  return strides;
}

// Takes in the form of a gradient that was not seen before: its dtype and its strides.
void Plan::learn_gradient(size_t t, const DLTensor& grad) {
  Entry& e = entries_[t];
  Shape& s = shapes_[t];
  Slot& slot = pipeline_.slots[t];
  const std::string name = what("gradient of parameter", t);
  e.grad_form = nullptr;
  const Form* const form = forms_.of(grad);
  const RealView view = RealView::of(*form, name);
  if (view.shape != s.view.shape)
    throw py::value_error(name + " does not have the parameter's shape");
  slot.grad_dtype = view.dtype;
  const RuleInfo& rule = kernels().rules[slot.rule];
  if (!rule.takes(slot.param_dtype, view.dtype))
    throw Unsupported(name + " has dtype " + dtype_name(view.dtype) + " and its parameter " +
                      dtype_name(slot.param_dtype) + ", a pair that the cpu backend does not take");
  std::deque<RealView> states;
  const std::vector<const int64_t*> strides = walked(t, view.strides.data(), &states);
  const int ndim = static_cast<int>(view.shape.size());
  if (!merge_layout(ndim, view.shape.data(), strides, &s.layout) ||
      !merge_layout(ndim, view.shape.data(), {view.strides.data()}, &s.grad_layout))
    throw py::value_error(name + " has more than " + std::to_string(kMaxDims) +
                          " dimensions that cannot be merged");
  if (s.rows != nullptr) s.rows->of_grad(view, strides, name);
  slot.layout = s.layout.linear() ? nullptr : &s.layout;
  slot.grad_layout = s.grad_layout.linear() ? nullptr : &s.grad_layout;
  e.grad_form = form;
}

void Plan::set_group(size_t g, const py::tuple& hyper, const py::tuple& clip) {
  Group& group = pipeline_.groups[g];
  for (size_t i = 0; i < hyper.size() && i < kMaxHyper; ++i)
    group.hyper[i] = py::cast<double>(hyper[i]);
  group.clip = {static_cast<ClipMode>(py::cast<int>(clip[0])), py::cast<double>(clip[1]),
                py::cast<double>(clip[2]), py::cast<double>(clip[3]), py::cast<double>(clip[4])};
  group.clip_value = py::cast<double>(clip[5]);
  group.maximize = py::cast<bool>(clip[6]);
}

int Plan::step(const py::list& param_lists, const py::list& hypers, const py::list& clips,
               int threads, double unscale, bool trusts_sums) {
  constexpr int kStale = static_cast<int>(Outcome::stale);
  applied_ = false;
  if (!unchanged(param_lists)) return kStale;
  pipeline_.unscale = unscale;
  for (size_t g = 0; g < pipeline_.groups.size(); ++g)
    set_group(g, py::reinterpret_borrow<py::tuple>(hypers[g]),
              py::reinterpret_borrow<py::tuple>(clips[g]));
  trusts_sums_ = trusts_sums && needs_reduce(pipeline_);
  stale_ = some_inactive_ = false;  // here: others look() while this thread is in begin()
  const auto release = [](Plan* self) { self->let_go(); };
  const std::unique_ptr<Plan, decltype(release)> guard(this, release);
  const Outcome outcome = run_released(&pipeline_, threads, this);
  if (exchange_) exchange_->rethrow();
  if (outcome == Outcome::applied) {
    applied_ = true;
    increment_version(written_);
    if (pipeline_.absorbs) forget_absorbed();
  }
  return static_cast<int>(outcome);
}

void Plan::set_exchange(const py::object& exchange, const std::vector<int64_t>& elements,
                        bool jointly) {
  exchange_ = std::make_unique<PyExchange>(exchange, &pipeline_.failed);
  pipeline_.exchange = exchange_.get();
  pipeline_.selects_jointly = jointly;
  for (size_t t = 0; t < pipeline_.slots.size(); ++t) {
    Slot& slot = pipeline_.slots[t];
    slot.elements = elements.at(t);
    // Others may accumulate a norm that nothing here has begun.
    pipeline_.accumulates = pipeline_.accumulates || kernels().rules[slot.rule].accumulates;
  }
}

std::vector<bool> Plan::active() const {
  std::vector<bool> out;
  for (const Slot& slot : pipeline_.slots) out.push_back(slot.active);
  return out;
}

int64_t Plan::summed() const {
  return std::count_if(pipeline_.slots.begin(), pipeline_.slots.end(),
                       [](const Slot& slot) { return slot.active && slot.summed; });
}

std::vector<std::string> Plan::nonfinite_names() const {
  std::vector<std::string> out;
  for (size_t t = 0; t < entries_.size(); ++t) {
    if (!pipeline_.slots[t].active) continue;
    bool found = false;
    for (int64_t i = pipeline_.chunks.first(static_cast<int64_t>(t));
         i < pipeline_.chunks.first(static_cast<int64_t>(t) + 1); ++i)
      found = found || pipeline_.partials[static_cast<size_t>(i)].nonfinite;
    if (found) out.push_back(names_[t]);
  }
  return out;
}

void bind_plan(py::module_& m) {
  py::class_<Plan>(m, "Plan")
      .def(py::init<const py::list&, const py::list&, const py::list&,
                    const std::vector<std::string>&, const std::vector<int>&,
                    std::vector<std::string>, const std::vector<bool>&, const py::list&, int, int,
                    double, const std::vector<int>&, const py::object&, const std::vector<int>&,
                    const std::vector<int>&, const std::vector<bool>&, const py::list&, bool>(),
           py::kw_only(), py::arg("params"), py::arg("state_dicts"), py::arg("state_keys"),
           py::arg("rules"), py::arg("groups"), py::arg("names"), py::arg("first"),
           py::arg("state_roots"), py::arg("scope"), py::arg("policy"), py::arg("norm_type"),
           py::arg("stage_scopes"), py::arg("select"), py::arg("low_states"),
           py::arg("param_storage"), py::arg("by_rows"), py::arg("sums"), py::arg("absorbs"))
      .def("selections", &Plan::selections)
      .def("step", &Plan::step)
      .def("set_exchange", &Plan::set_exchange, py::arg("exchange"), py::arg("elements"),
           py::arg("jointly"))
      .def("absorb", &Plan::absorb)
      .def("norms", &Plan::norms)
      .def("coefs", &Plan::coefs)
      .def("active", &Plan::active)
      .def("applied", &Plan::applied)
      .def("summed", &Plan::summed)
      .def("nonfinite_names", &Plan::nonfinite_names)
      .def_property_readonly("reduced", &Plan::reduced);
}

}  // namespace pysmooth

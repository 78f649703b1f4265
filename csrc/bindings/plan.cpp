#include "bindings/plan.h"

#include <algorithm>
#include <optional>

#include "bindings/aliasing.h"
#include "bindings/run_released.h"
#include "bindings/select_spec.h"

namespace pysmooth {
int find_rule(const std::string& name) {
  for (int i = 0; i < kernels().rule_count; ++i)
    if (name == kernels().rules[i].name) return i;
  throw py::value_error("rule '" + name + "' is not known to the cpu backend");
}

namespace {

// In the dict of a parameter's states: how many gradients they have taken in since the last step.
PyObject* absorbed_key() {
  static PyObject* const key = PyUnicode_InternFromString("absorbed");
  return key;
}

}  // namespace

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
      grads_(params.size()) {
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
    e.tracked = tracked_.size();
    tracked_.push_back({param, {}});
    tracked_.back().form.assign(d);
    RealView& view = shapes_.emplace_back().view;
    view = RealView::of(tracked_.back().form, name());
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
    slot.numel = view.numel;
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
  e.expected_states = expected;
  for (int k = 0; k < expected; ++k) e.keys[k] = keys[static_cast<size_t>(k)].ptr();
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
    tracked_.push_back({state, {}});
    tracked_.back().form.assign(d);
    const RealView view = RealView::of(tracked_.back().form, name());
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
        Region::of(known(e, 0).form.data, shapes_[t].view, static_cast<int>(labels.size())));
    labels.push_back(what("parameter", t));
    for (int k = 1; k <= e.states_held; ++k) {
      const Signature& form = known(e, k).form;
      views.push_back(RealView::of(form, "state"));
      regions.push_back(Region::of(form.data, views.back(), static_cast<int>(labels.size())));
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
    states->push_back(RealView::of(known(e, k).form, "state"));
    strides.push_back(states->back().strides.data());
  }
  if (pipeline_.slots[t].storage == ParamStorage::master)
    std::swap(strides.front(), strides.back());
  return strides;
}

// For a step that finds the gradient in the states: nobody reads the one that is given here.
void Plan::learn_own_layout(size_t t) {
  Shape& s = shapes_[t];
  const RuleInfo& rule = kernels().rules[pipeline_.slots[t].rule];
  if (!rule.absorbs)
    throw py::value_error("rule '" + std::string(rule.name) + "' does not absorb gradients");
  std::deque<RealView> states;
  if (!merge_layout(static_cast<int>(s.view.shape.size()), s.view.shape.data(),
                    walked(t, s.view.strides.data(), &states), &s.own_layout))
    throw py::value_error(what("parameter", t) + " has more than " + std::to_string(kMaxDims) +
                          " dimensions that cannot be merged");
}

// Takes in the form of a gradient that was not seen before: its dtype and its strides.
void Plan::learn_gradient(size_t t, const DLTensor& grad) {
  Entry& e = entries_[t];
  Shape& s = shapes_[t];
  Slot& slot = pipeline_.slots[t];
  const std::string name = what("gradient of parameter", t);
  e.grad_known = false;
  e.grad_form.assign(grad);
  const RealView view = RealView::of(e.grad_form, name);
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
  e.grad_known = true;
}

bool Plan::unchanged(const py::list& param_lists) const {
  if (param_lists.size() < group_sizes_.size()) return false;
  PyObject* const* known = param_list_.data();
  for (size_t g = 0; g < param_lists.size(); ++g) {
    PyObject* const list = PyList_GET_ITEM(param_lists.ptr(), static_cast<Py_ssize_t>(g));
    const size_t expected = g < group_sizes_.size() ? group_sizes_[g] : 0;
    if (!PyList_CheckExact(list) || static_cast<size_t>(PyList_GET_SIZE(list)) != expected)
      return false;
    if (!std::equal(known, known + expected, PySequence_Fast_ITEMS(list))) return false;
    known += expected;
  }
  return true;
}

bool Plan::unmoved(size_t t) const {
  const Entry& e = entries_[t];
  if (e.states_held != e.expected_states) return false;
  DLTensor d;
  for (int k = 0; k <= e.states_held; ++k) {
    const Tracked& x = known(e, k);
    // A state's object is alive if its dict still holds it.
    if (k > 0 && PyDict_GetItemWithError(e.state_dict, e.keys[k - 1]) != x.tensor) return false;
    shared_reader().read(x.tensor, &d,
                         [&] { return (k == 0 ? "" : "a state of ") + what("parameter", t); });
    if (!x.form.same(d)) return false;
  }
  return true;
}

void Plan::read_gradient(size_t t) {
  Entry& e = entries_[t];
  Slot& slot = pipeline_.slots[t];
  DLTensor d;
  const auto read = [&] {
    shared_reader().read(grads_[t].ptr(), &d, [&] { return what("gradient of parameter", t); });
    if (!e.grad_known || !e.grad_form.same_form(d)) learn_gradient(t, d);
  };
  read();
  // Asking every gradient would cost as much as reading it. Lazy bits ride on complex tensors and
  // on the strided views of their parts; of those only a view of one element looks dense
  // (as_strided on a negated view could make others, and is on its own).
  const bool may_be_lazy = slot.layout != nullptr || slot.numel == 1 || d.dtype.code == kDLComplex;
  if (may_be_lazy && has_lazy_bits(grads_[t].ptr())) {
    grads_[t] = grads_[t].attr("resolve_conj")().attr("resolve_neg")();
    read();
  }
  slot.grad = d.data;
  if (e.sums != nullptr && trusts_sums_ && slot.rows == nullptr) find_sums(t, d);
}

void Plan::find_sums(size_t t, const DLTensor& grad) {
  const auto first = static_cast<size_t>(pipeline_.chunks.first(static_cast<int64_t>(t)));
  const Kept kept = entries_[t].sums->find(grads_[t], grad, pipeline_.partials.data() + first);
  pipeline_.slots[t].summed = kept == Kept::valid;
  if (kept == Kept::tampered) trusts_sums_ = false;
}

// What absorb() has taken in since the last step.
int64_t Plan::absorbed(size_t t) const {
  PyObject* const count = PyDict_GetItemWithError(entries_[t].state_dict, absorbed_key());
  if (count == nullptr) return 0;
  const int64_t value = PyLong_Check(count) ? PyLong_AsLongLong(count) : -1;
  if (value < 0)
    throw py::type_error("state 'absorbed' of " + what("parameter", t) + " is not a count");
  return value;
}

bool Plan::gather() {
  bool all_active = true;
  for (Slot& slot : pipeline_.slots) slot.summed = false;
  for (size_t t = 0; t < entries_.size(); ++t) {
    if (pipeline_.absorbs) {
      Slot& slot = pipeline_.slots[t];
      slot.absorbed = slot.active = slot.numel > 0 && absorbed(t) > 0;
      slot.layout = shapes_[t].own_layout.linear() ? nullptr : &shapes_[t].own_layout;
      all_active = all_active && slot.active;
      if (slot.active && !unmoved(t)) return false;
      continue;
    }
    grads_[t] = grad_of_(param_list_[t]);
    Slot& slot = pipeline_.slots[t];
    slot.active = !grads_[t].is_none() && slot.numel > 0;
    all_active = all_active && slot.active;
    if (!slot.active) {
      if (slot.norm_sq != nullptr && !unmoved(t)) return false;  // written all the same
      continue;
    }
    // First what the plan knows: a gradient is judged against a parameter that is still the same.
    if (!unmoved(t)) return false;
    read_gradient(t);
  }
  // Whoever wrote to one gradient behind torch's back may have written to others.
  if (!trusts_sums_)
    for (Slot& slot : pipeline_.slots) slot.summed = false;
  if (!all_active || !all_active_) note_written();
  all_active_ = all_active;
  return true;
}

// What autograd is to be told of. States come as the roots of their views.
void Plan::note_written() {
  written_ = py::list();
  for (size_t t = 0; t < entries_.size(); ++t)
    if (pipeline_.slots[t].active) written_.append(py::handle(param_list_[t]));
  for (const py::handle root : state_roots_) written_.append(root);
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

int Plan::absorb(size_t t, const py::tuple& hyper, const py::tuple& clip, int threads) {
  if (t >= entries_.size()) throw py::index_error("Plan.absorb: there is no such parameter");
  if (!unmoved(t)) return static_cast<int>(Outcome::stale);
  Slot& slot = pipeline_.slots[t];
  const auto free_gradient = [&] {
    if (PyObject_SetAttrString(param_list_[t], "grad", Py_None) != 0) throw py::error_already_set();
    return static_cast<int>(Outcome::applied);
  };
  if (slot.numel == 0) return free_gradient();
  set_group(static_cast<size_t>(slot.group), hyper, clip);
  pipeline_.unscale = 1.0;
  const auto release = [&](void*) { grads_[t] = py::object(); };
  const std::unique_ptr<void, decltype(release)> guard(this, release);
  grads_[t] = grad_of_(param_list_[t]);
  const Shape& s = shapes_[t];
  slot.layout = s.layout.linear() ? nullptr : &s.layout;
  read_gradient(t);
  slot.layout = s.layout.linear() ? nullptr : &s.layout;
  Outcome outcome;
  {
    std::optional<py::gil_scoped_release> released;
    if (slot.numel >= kSerialElements) released.emplace();
    outcome = pysmooth::absorb(&pipeline_, t, slot.numel < kSerialElements ? 1 : threads);
  }
  slot.grad = nullptr;
  if (outcome != Outcome::applied) return static_cast<int>(outcome);
  py::list written;
  for (int k = 1; k <= entries_[t].states_held; ++k)
    written.append(py::handle(known(entries_[t], k).tensor));
  increment_version(written);
  const py::int_ count(absorbed(t) + 1);
  if (PyDict_SetItem(entries_[t].state_dict, absorbed_key(), count.ptr()) != 0)
    throw py::error_already_set();
  return free_gradient();
}

int Plan::step(const py::list& param_lists, const py::list& hypers, const py::list& clips,
               int threads, double unscale, bool trusts_sums) {
  constexpr int kStale = static_cast<int>(Outcome::stale);
  if (!unchanged(param_lists)) return kStale;
  pipeline_.unscale = unscale;
  for (size_t g = 0; g < pipeline_.groups.size(); ++g)
    set_group(g, py::reinterpret_borrow<py::tuple>(hypers[g]),
              py::reinterpret_borrow<py::tuple>(clips[g]));
  trusts_sums_ = trusts_sums && needs_reduce(pipeline_);
  const auto release = [this](void*) {
    for (py::object& grad : grads_) grad = py::object();
  };
  const std::unique_ptr<void, decltype(release)> guard(this, release);
  const Outcome outcome = run_released(&pipeline_, threads, [this] { return gather(); });
  if (outcome == Outcome::applied) increment_version(written_);
  if (outcome == Outcome::applied && pipeline_.absorbs) {
    const py::int_ none(0);
    for (size_t t = 0; t < entries_.size(); ++t)
      if (pipeline_.slots[t].active)
        if (PyDict_SetItem(entries_[t].state_dict, absorbed_key(), none.ptr()) != 0)
          throw py::error_already_set();
  }
  return static_cast<int>(outcome);
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
      .def("absorb", &Plan::absorb)
      .def("norms", &Plan::norms)
      .def("coefs", &Plan::coefs)
      .def("active", &Plan::active)
      .def("summed", &Plan::summed)
      .def("nonfinite_names", &Plan::nonfinite_names)
      .def_property_readonly("reduced", &Plan::reduced);
}

}  // namespace pysmooth

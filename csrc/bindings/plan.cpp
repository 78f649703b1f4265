#include "bindings/plan.h"

#include "bindings/aliasing.h"

namespace pysmooth {
namespace {

PyObject* grad_name() {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  return name;
}

}  // namespace

int find_rule(const std::string& name) {
  for (int i = 0; i < kernels().rule_count; ++i)
    if (name == kernels().rules[i].name) return i;
  throw py::value_error("rule '" + name + "' is not known to the cpu backend");
}

Plan::Plan(const py::list& params, const py::list& state_dicts, const py::list& state_keys,
           const std::vector<std::string>& rules, const std::vector<int>& groups,
           std::vector<std::string> names, const std::vector<bool>& first, int scope, int policy,
           double norm_type)
    : params_(params),
      state_dicts_(state_dicts),
      state_keys_(state_keys),
      names_(std::move(names)),
      entries_(params.size()),
      grads_(params.size()) {
  const size_t n = params.size();
  if (state_dicts.size() != n || state_keys.size() != n || rules.size() != n ||
      groups.size() != n || names_.size() != n || first.size() != n)
    throw py::value_error("Plan: all lists must be as long as params");
  pipeline_.slots.resize(n);
  pipeline_.scope = static_cast<Scope>(scope);
  pipeline_.policy = static_cast<NonFinite>(policy);
  pipeline_.norm_type = norm_type;
  for (size_t t = 0; t < n; ++t) {
    Entry& e = entries_[t];
    Slot& slot = pipeline_.slots[t];
    e.param = params_[t].ptr();
    e.state_dict = state_dicts_[t].ptr();
    const auto name = [&] { return what("parameter", t); };
    DLTensor d;
    shared_reader().read(e.param, &d, name);
    e.param_form.assign(d);
    e.view = RealView::of(e.param_form, name());
    if (has_lazy_bits(e.param))
      throw py::value_error(name() + " has its conjugate or negative bit set; pass a resolved copy");
    if (overlaps_itself(static_cast<int>(e.view.shape.size()), e.view.shape.data(),
                        e.view.strides.data()))
      throw py::value_error(name() + " overlaps itself in memory (an expanded tensor?)");
    slot.rule = find_rule(rules[t]);
    slot.group = groups[t];
    if (slot.group < 0) throw py::value_error("Plan: groups must not be negative");
    if (static_cast<size_t>(slot.group) >= group_sizes_.size())
      group_sizes_.resize(static_cast<size_t>(slot.group) + 1, 0);
    ++group_sizes_[static_cast<size_t>(slot.group)];
    slot.numel = e.view.numel;
    slot.param_dtype = e.view.dtype;
    slot.param = e.param_form.data;
    slot.first = first[t];
    read_states(t, py::reinterpret_borrow<py::tuple>(state_keys_[t]));
  }
  check_aliasing();
  pipeline_.groups.resize(group_sizes_.size());
  pipeline_.cut_chunks();
}

// A slot's states are either all there or, for a parameter that never had a gradient, all missing.
void Plan::read_states(size_t t, const py::tuple& keys) {
  Entry& e = entries_[t];
  Slot& slot = pipeline_.slots[t];
  const int expected = kernels().rules[slot.rule].states;
  if (static_cast<int>(keys.size()) != expected)
    throw py::value_error("rule '" + std::string(kernels().rules[slot.rule].name) + "' has " +
                          std::to_string(expected) + " states, not " +
                          std::to_string(keys.size()));
  const DType wanted = slot.param_dtype == DType::f64 ? DType::f64 : DType::f32;
  for (const py::handle key : keys) {
    PyObject* const state = PyDict_GetItemWithError(e.state_dict, key.ptr());
    if (state == nullptr || state == Py_None) return e.states.clear(), e.state_forms.clear();
    const auto name = [&] {
      return "state '" + py::cast<std::string>(key) + "' of " + what("parameter", t);
    };
    DLTensor d;
    shared_reader().read(state, &d, name);
    Signature form;
    form.assign(d);
    const RealView view = RealView::of(form, name());
    if (view.shape != e.view.shape)
      throw py::value_error(name() + " does not have the parameter's shape");
    if (view.dtype != wanted)
      throw py::value_error(name() + " has dtype " + dtype_name(view.dtype) + ", expected " +
                            dtype_name(wanted));
    if (has_lazy_bits(state))
      throw py::value_error(name() + " has its conjugate or negative bit set");
    if (overlaps_itself(static_cast<int>(view.shape.size()), view.shape.data(),
                        view.strides.data()))
      throw py::value_error(name() + " overlaps itself in memory (an expanded tensor?)");
    slot.state[e.states.size()] = form.data;
    e.states.push_back(state);
    e.state_forms.push_back(std::move(form));
  }
}

void Plan::check_aliasing() {
  std::vector<Region> regions;
  std::deque<RealView> views;
  std::vector<std::string> labels;
  for (size_t t = 0; t < entries_.size(); ++t) {
    const Entry& e = entries_[t];
    regions.push_back(Region::of(e.param_form.data, e.view, static_cast<int>(labels.size())));
    labels.push_back(what("parameter", t));
    for (const Signature& form : e.state_forms) {
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

// Takes in the form of a gradient that was not seen before: its dtype and its strides.
void Plan::learn_gradient(size_t t, const DLTensor& grad) {
  Entry& e = entries_[t];
  Slot& slot = pipeline_.slots[t];
  const std::string name = what("gradient of parameter", t);
  e.grad_known = false;
  e.grad_form.assign(grad);
  const RealView view = RealView::of(e.grad_form, name);
  if (view.shape != e.view.shape)
    throw py::value_error(name + " does not have the parameter's shape");
  slot.grad_dtype = view.dtype;
  const RuleInfo& rule = kernels().rules[slot.rule];
  if (rule.apply[static_cast<int>(slot.param_dtype)][static_cast<int>(view.dtype)] == nullptr)
    throw Unsupported(name + " has dtype " + dtype_name(view.dtype) + " and its parameter " +
                      dtype_name(slot.param_dtype) + ", a pair that the cpu backend does not take");
  std::vector<const int64_t*> strides{e.view.strides.data(), view.strides.data()};
  std::deque<RealView> states;
  for (const Signature& form : e.state_forms) {
    states.push_back(RealView::of(form, "state"));
    strides.push_back(states.back().strides.data());
  }
  const int ndim = static_cast<int>(view.shape.size());
  if (!merge_layout(ndim, view.shape.data(), strides, &e.layout) ||
      !merge_layout(ndim, view.shape.data(), {view.strides.data()}, &e.grad_layout))
    throw py::value_error(name + " has more than " + std::to_string(kMaxDims) +
                          " dimensions that cannot be merged");
  slot.layout = e.layout.linear() ? nullptr : &e.layout;
  slot.grad_layout = e.grad_layout.linear() ? nullptr : &e.grad_layout;
  e.grad_known = true;
}

bool Plan::unchanged(const py::list& param_lists) const {
  if (param_lists.size() < group_sizes_.size()) return false;
  size_t t = 0;
  for (size_t g = 0; g < param_lists.size(); ++g) {
    PyObject* const list = PyList_GET_ITEM(param_lists.ptr(), static_cast<Py_ssize_t>(g));
    const size_t expected = g < group_sizes_.size() ? group_sizes_[g] : 0;
    if (!PyList_CheckExact(list) || static_cast<size_t>(PyList_GET_SIZE(list)) != expected)
      return false;
    for (size_t i = 0; i < expected; ++i, ++t)
      if (PyList_GET_ITEM(list, static_cast<Py_ssize_t>(i)) != entries_[t].param) return false;
  }
  return true;
}

bool Plan::gather() {
  TensorReader& reader = shared_reader();
  const size_t n = entries_.size();
  bool all_active = true;
  for (size_t t = 0; t < n; ++t) {
    Entry& e = entries_[t];
    Slot& slot = pipeline_.slots[t];
    PyObject* const grad = PyObject_GetAttr(e.param, grad_name());
    if (grad == nullptr) throw py::error_already_set();
    grads_[t] = py::reinterpret_steal<py::object>(grad);
    slot.active = grad != Py_None && slot.numel > 0;
    if (!slot.active) {
      all_active = false;
      continue;
    }
    DLTensor d;
    reader.read(grad, &d, [&] { return what("gradient of parameter", t); });
    if (!e.grad_known || !e.grad_form.same_form(d)) learn_gradient(t, d);
    // Lazy bits ride on complex tensors and on the strided views of their parts; a single element
    // is the one case where such a view looks dense.
    if (slot.layout != nullptr || slot.numel <= 2 || d.dtype.code == kDLComplex) {
      if (has_lazy_bits(grad)) {
        grads_[t] = grads_[t].attr("resolve_conj")().attr("resolve_neg")();
        reader.read(grads_[t].ptr(), &d, [&] { return what("gradient of parameter", t); });
        if (!e.grad_form.same_form(d)) learn_gradient(t, d);
      }
    }
    slot.grad = d.data;

    reader.read(e.param, &d, [&] { return what("parameter", t); });
    if (!e.param_form.same(d)) return false;
    const int states = kernels().rules[slot.rule].states;
    if (static_cast<int>(e.states.size()) != states) return false;
    for (int k = 0; k < states; ++k) {
      PyObject* const keys = PyList_GET_ITEM(state_keys_.ptr(), static_cast<Py_ssize_t>(t));
      const auto at = static_cast<size_t>(k);
      if (PyDict_GetItemWithError(e.state_dict, PyTuple_GET_ITEM(keys, k)) != e.states[at])
        return false;
      reader.read(e.states[at], &d, [&] { return "a state of " + what("parameter", t); });
      if (!e.state_forms[at].same(d)) return false;
    }
  }
  if (!all_active || !all_active_ || written_.empty()) {
    written_ = py::list();
    for (size_t t = 0; t < n; ++t) {
      if (!pipeline_.slots[t].active) continue;
      written_.append(py::handle(entries_[t].param));
      for (PyObject* state : entries_[t].states) written_.append(py::handle(state));
    }
  }
  all_active_ = all_active;
  return true;
}

int Plan::step(const py::list& param_lists, const py::list& hypers, const py::list& clips,
               int threads) {
  if (!unchanged(param_lists)) return kStale;
  const auto release = [this](void*) {
    for (py::object& grad : grads_) grad = py::object();
  };
  const std::unique_ptr<void, decltype(release)> guard(this, release);
  if (!gather()) return kStale;
  for (size_t g = 0; g < pipeline_.groups.size(); ++g) {
    Group& group = pipeline_.groups[g];
    const auto hyper = py::reinterpret_borrow<py::tuple>(hypers[g]);
    for (size_t i = 0; i < hyper.size() && i < kMaxHyper; ++i)
      group.hyper[i] = py::cast<double>(hyper[i]);
    const auto clip = py::reinterpret_borrow<py::tuple>(clips[g]);
    group.clip = {static_cast<ClipMode>(py::cast<int>(clip[0])), py::cast<double>(clip[1]),
                  py::cast<double>(clip[2]), py::cast<double>(clip[3]), py::cast<double>(clip[4])};
  }
  Outcome outcome;
  {
    py::gil_scoped_release nogil;
    outcome = run_step(&pipeline_, threads);
  }
  if (outcome == Outcome::applied) increment_version(written_);
  return static_cast<int>(outcome);
}

std::vector<bool> Plan::active() const {
  std::vector<bool> out;
  for (const Slot& slot : pipeline_.slots) out.push_back(slot.active);
  return out;
}

std::vector<int> Plan::unapplied() const {
  std::vector<int> out;
  for (size_t t = 0; t < entries_.size(); ++t)
    if (pipeline_.slots[t].first && !entries_[t].states.empty()) out.push_back(static_cast<int>(t));
  return out;
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
                    std::vector<std::string>, const std::vector<bool>&, int, int, double>(),
           py::kw_only(), py::arg("params"), py::arg("state_dicts"), py::arg("state_keys"),
           py::arg("rules"), py::arg("groups"), py::arg("names"), py::arg("first"),
           py::arg("scope"), py::arg("policy"), py::arg("norm_type"))
      .def("step", &Plan::step)
      .def("norms", &Plan::norms)
      .def("coefs", &Plan::coefs)
      .def("active", &Plan::active)
      .def("unapplied", &Plan::unapplied)
      .def("nonfinite_names", &Plan::nonfinite_names)
      .def_property_readonly("reduced", &Plan::reduced);
}

}  // namespace pysmooth

// Gradients that are taken into the states as soon as backward has made them, and freed.

#include <optional>

#include "bindings/plan.h"

namespace pysmooth {
namespace {

// In the dict of a parameter's states: how many gradients they have taken in since the last step.
PyObject* absorbed_key() {
  static PyObject* const key = PyUnicode_InternFromString("absorbed");
  return key;
}

}  // namespace

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

// What absorb() has taken in since the last step.
int64_t Plan::absorbed(size_t t) const {
  PyObject* const count = PyDict_GetItemWithError(entries_[t].state_dict, absorbed_key());
  if (count == nullptr) return 0;
  const int64_t value = PyLong_Check(count) ? PyLong_AsLongLong(count) : -1;
  if (value < 0)
    throw py::type_error("state 'absorbed' of " + what("parameter", t) + " is not a count");
  return value;
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

// Gradients that were taken in count for one step.
void Plan::forget_absorbed() {
  const py::int_ none(0);
  for (size_t t = 0; t < entries_.size(); ++t)
    if (pipeline_.slots[t].active &&
        PyDict_SetItem(entries_[t].state_dict, absorbed_key(), none.ptr()) != 0)
      throw py::error_already_set();
}

}  // namespace pysmooth

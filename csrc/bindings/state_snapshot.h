// Whose states lie in which dict: an optimizer's `state`, as it was when a plan was made. Its order
// is kept and walked, since tensors hash slowly.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

namespace pysmooth {

namespace py = pybind11;

// A plan looks into the dicts that it knows. That those are still the optimizer's, it cannot see.
class StateSnapshot {
 public:
  explicit StateSnapshot(const py::dict& state) {
    for (const auto& [param, states] : state)
      entries_.emplace_back(py::reinterpret_borrow<py::object>(param),
                            py::reinterpret_borrow<py::object>(states));
  }

  bool same(const py::dict& state) const {
    if (state.size() != entries_.size()) return false;
    PyObject *param = nullptr, *states = nullptr;
    Py_ssize_t at = 0;
    for (const auto& [known, held] : entries_)
      if (PyDict_Next(state.ptr(), &at, &param, &states) == 0 || param != known.ptr() ||
          states != held.ptr())
        return false;
    return true;
  }

 private:
  std::vector<std::pair<py::object, py::object>> entries_;
};

}  // namespace pysmooth

#include "bindings/watch.h"

namespace pysmooth {
namespace {

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

void* address_of(const py::object& tensor) {
  DLTensor t;
  return shared_reader().peek(tensor.ptr(), &t) ? t.data : nullptr;
}

// A gradient that lies in one block may be asked for lazy bits less often (docs/decisions/003).
bool may_be_lazy(const DLTensor& t, int64_t numel) {
  int64_t dense = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] != 1 && t.strides[d] != dense) return true;
    dense *= t.shape[d];
  }
  return t.dtype.code == kDLComplex || numel == 1;
}

}  // namespace

Watch::Watch(const py::list& params, const py::list& grads, const py::dict& state,
             const std::vector<std::string>& keys)
    : dicts_(state) {
  for (size_t i = 0; i < params.size(); ++i) {
    Member m{params[i], address_of(params[i]), {}};
    DLTensor t;
    if (!grads[i].is_none() && shared_reader().peek(py::object(grads[i]).ptr(), &t)) {
      int64_t numel = 1;
      for (int d = 0; d < t.ndim; ++d) numel *= t.shape[d];
      m.grad.assign(t);
      m.aligned = aligned(t.data);
      m.empty = numel == 0;
      m.lazy = may_be_lazy(t, numel);
    }
    members_.push_back(std::move(m));
  }
  for (const auto& item : state) {
    Entry e{py::reinterpret_borrow<py::dict>(item.second), {}};
    for (const std::string& key : keys)
      if (e.states.contains(key.c_str())) {
        PyObject* const interned = PyUnicode_InternFromString(key.c_str());
        const py::object tensor = e.states[key.c_str()];
        e.held.push_back({py::reinterpret_steal<py::str>(interned), tensor, address_of(tensor)});
      }
    entries_.push_back(std::move(e));
  }
}

bool Watch::same_params(const py::list& groups) const {
  size_t i = 0;
  for (const py::handle group : groups) {
    const py::list params = group["params"];
    for (const py::handle p : params) {
      if (i == members_.size() || members_[i].param.ptr() != p.ptr()) return false;
      DLTensor t;
      if (!shared_reader().peek(p.ptr(), &t) || t.data != members_[i].address) return false;
      ++i;
    }
  }
  return i == members_.size();
}

bool Watch::same_states(const py::dict& state) const {
  if (!dicts_.same(state)) return false;
  for (const Entry& e : entries_)
    for (const Held& held : e.held) {
      DLTensor t;
      if (PyDict_GetItem(e.states.ptr(), held.key.ptr()) != held.tensor.ptr()) return false;
      if (!shared_reader().peek(held.tensor.ptr(), &t) || t.data != held.address) return false;
    }
  return true;
}

bool Watch::same_grad(const Member& m, int64_t* address) {
  const py::object grad = grad_of_(m.param.ptr());
  *address = 0;
  if (grad.is_none()) return true;
  DLTensor t;
  if (m.grad.ndim < 0 || !shared_reader().peek(grad.ptr(), &t)) return false;
  if (!m.grad.same_form(t) || (m.lazy && has_lazy_bits(grad.ptr()))) return false;
  ++present_;
  if (m.empty) return true;
  *address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data));
  return t.data != nullptr && aligned(t.data) == m.aligned;
}

py::object Watch::look(const py::list& groups, const py::dict& state) {
  if (!same_params(groups) || !same_states(state)) return py::none();
  present_ = 0;
  std::vector<int64_t> out(members_.size());
  for (size_t i = 0; i < out.size(); ++i)
    if (!same_grad(members_[i], &out[i])) return py::none();
  return py::bytes(reinterpret_cast<const char*>(out.data()), out.size() * sizeof(int64_t));
}

void bind_watch(py::module_& m) {
  py::class_<Watch>(m, "Watch")
      .def(py::init<const py::list&, const py::list&, const py::dict&,
                    const std::vector<std::string>&>(),
           py::arg("params"), py::arg("grads"), py::arg("state"), py::arg("keys"))
      .def("look", &Watch::look, py::arg("groups"), py::arg("state"))
      .def_property_readonly("all_present", &Watch::all_present);
}

}  // namespace pysmooth

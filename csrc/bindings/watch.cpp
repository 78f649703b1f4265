#include "bindings/watch.h"

namespace pysmooth {
namespace {

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

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
    Member m{known(params[i]), {}};
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
        e.held.push_back({py::reinterpret_steal<py::str>(interned), known(e.states[key.c_str()])});
      }
    entries_.push_back(std::move(e));
  }
}

Watch::Known Watch::known(const py::object& tensor) const {
  const void* const impl = direct_ == nullptr ? nullptr : direct_->impl_of_plain(tensor.ptr());
  DLTensor t;
  if (impl != nullptr && direct_->peek(&impl, &t)) return {tensor, impl, t.data};
  return {tensor, nullptr, shared_reader().peek(tensor.ptr(), &t) ? t.data : nullptr};
}

// Whether the tensor's memory is where it was.
bool Watch::same(const Known& x) const {
  DLTensor t;
  const bool told = x.impl != nullptr
                        ? direct_->impl_of(x.tensor.ptr()) == x.impl && direct_->peek(&x.impl, &t)
                        : shared_reader().peek(x.tensor.ptr(), &t);
  return told && t.data == x.address;
}

bool Watch::same_params(const py::list& groups) const {
  size_t i = 0;
  for (const py::handle group : groups) {
    const py::list params = group["params"];
    for (const py::handle p : params) {
      if (i == members_.size() || members_[i].param.tensor.ptr() != p.ptr()) return false;
      if (!same(members_[i++].param)) return false;
    }
  }
  return i == members_.size();
}

bool Watch::same_states(const py::dict& state) const {
  if (!dicts_.same(state)) return false;
  for (const Entry& e : entries_)
    for (const Held& held : e.held) {
      const Known& state = held.state;
      if (PyDict_GetItem(e.states.ptr(), held.key.ptr()) != state.tensor.ptr()) return false;
      if (!same(state)) return false;
    }
  return true;
}

bool Watch::same_grad(const Member& m, int64_t* address) {
  *address = 0;
  DLTensor t;
  if (m.param.impl != nullptr && !m.lazy) {
    const Handle grad = direct_->grad_of(m.param.impl);
    if (grad == nullptr) return true;
    if (m.grad.ndim < 0 || !direct_->peek(grad, &t)) return false;
  } else {
    const py::object grad = grad_of_(m.param.tensor.ptr());
    if (grad.is_none()) return true;
    if (m.grad.ndim < 0 || !shared_reader().peek(grad.ptr(), &t)) return false;
    if (m.lazy && has_lazy_bits(grad.ptr())) return false;
  }
  if (!m.grad.same_form(t)) return false;
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

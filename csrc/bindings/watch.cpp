#include "bindings/watch.h"

#include <algorithm>

namespace pysmooth {
namespace {

constexpr size_t kBlock = 32;  // of parameters, whose cache lines are asked for at once

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

bool same_device(DLDevice a, DLDevice b) {
  return a.device_type == b.device_type && a.device_id == b.device_id;
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

Watch::Watch(const py::list& params, const py::list& grads, const py::list& state_dicts,
             const py::list& state_keys, const py::dict& state, const py::list& roots, bool aligns)
    : members_(params.size()), addresses_(params.size()), dicts_(state), aligns_(aligns) {
  for (size_t t = 0; t < members_.size(); ++t) {
    Member& m = members_[t];
    m.param = known(params[t]);
    if (!grads[t].is_none()) know_grad(grads[t], &m);
    owned_.append(state_dicts[t]);
    m.states = owned_[owned_.size() - 1].ptr();
    m.first = held_.size();
    for (const py::handle key : py::reinterpret_borrow<py::tuple>(state_keys[t])) {
      PyObject* const found = PyDict_GetItemWithError(m.states, key.ptr());
      if (found == nullptr || found == Py_None) continue;
      owned_.append(key);
      held_.push_back({key.ptr(), known(found)});
    }
    m.last = held_.size();
  }
  for (const py::handle root : roots) roots_.push_back(known(root));
}

Watch::Known Watch::known(const py::handle& tensor) {
  owned_.append(tensor);
  Known out{tensor.ptr(), direct_ == nullptr ? nullptr : direct_->impl_of_plain(tensor.ptr()), {}};
  DLTensor t;
  if (out.impl != nullptr && direct_->peek(&out.impl, &t)) {
    out.form.assign(t);
  } else {
    out.impl = nullptr;
    if (shared_reader().peek(tensor.ptr(), &t)) out.form.assign(t);
  }
  return out;
}

void Watch::know_grad(const py::handle& grad, Member* m) const {
  DLTensor t;
  if (!shared_reader().peek(grad.ptr(), &t)) return;
  int64_t numel = 1;
  for (int d = 0; d < t.ndim; ++d) numel *= t.shape[d];
  m->empty = numel == 0;
  m->lazy = may_be_lazy(t, numel);
  const void* const impl = direct_ == nullptr ? nullptr : direct_->impl_if_exact(grad.ptr());
  if (asks_directly(*m) && (impl == nullptr || !direct_->peek_placed(&impl, &t))) {
    m->param.impl = nullptr;
    m->lazy = true;
  }
  m->grad.assign(t);
  m->device = t.device;
  m->aligned = aligned(t.data);
}

// Whether the tensor is what it was, and its memory where it was.
bool Watch::same(const Known& x) const {
  DLTensor t;
  const bool told = x.impl != nullptr
                        ? direct_->impl_of(x.tensor) == x.impl && direct_->peek(&x.impl, &t)
                        : shared_reader().peek(x.tensor, &t);
  return told && x.form.same(t);
}

bool Watch::same_lists(const py::list& groups) const {
  static PyObject* const key = PyUnicode_InternFromString("params");
  size_t t = 0;
  for (const py::handle group : groups) {
    PyObject* const params = PyDict_GetItemWithError(group.ptr(), key);
    if (params == nullptr || !PyList_CheckExact(params)) return false;
    const auto count = static_cast<size_t>(PyList_GET_SIZE(params));
    if (count > members_.size() - t) return false;
    for (size_t i = 0; i < count; ++i, ++t)
      if (PyList_GET_ITEM(params, static_cast<Py_ssize_t>(i)) != members_[t].param.tensor)
        return false;
  }
  return t == members_.size();
}

bool Watch::same_grad(Member* m, const void** address) {
  *address = nullptr;
  DLTensor t;
  if (asks_directly(*m)) {
    if (m->place == nullptr) return true;
    if (m->grad.ndim < 0 || !direct_->peek_placed(m->place, &t)) return false;
    if (direct_->tells_lazy() && direct_->lazy(m->place)) return false;
  } else {
    const py::object grad = grad_of_(m->param.tensor);
    m->present = !grad.is_none();
    if (!m->present) return true;
    if (m->grad.ndim < 0 || !shared_reader().peek(grad.ptr(), &t)) return false;
    if (m->lazy && has_lazy_bits(grad.ptr())) return false;
  }
  if (!m->grad.same_form(t) || !same_device(t.device, m->device)) return false;
  if (m->empty) return true;
  *address = t.data;
  return t.data != nullptr && (!aligns_ || aligned(t.data) == m->aligned);
}

// Asks for the cache lines of all that will be looked at: one after another, each would be waited
// for. First for objects, later for what these point to.
void Watch::fetch_objects(size_t begin, size_t end) const {
  for (size_t t = begin; t < end; ++t) {
    const Member& m = members_[t];
    __builtin_prefetch(m.param.tensor);
    __builtin_prefetch(m.place);
    __builtin_prefetch(m.states);
    Direct::fetch_impl(m.param.impl);
    for (size_t k = m.first; k < m.last; ++k) {
      __builtin_prefetch(held_[k].state.tensor);
      Direct::fetch_impl(held_[k].state.impl);
    }
  }
}

void Watch::fetch_storages(size_t begin, size_t end) const {
  for (size_t t = begin; t < end; ++t) {
    const Member& m = members_[t];
    direct_->fetch_storage(m.param.impl);
    __builtin_prefetch(reinterpret_cast<const PyDictObject*>(m.states)->ma_keys);
    for (size_t k = m.first; k < m.last; ++k) direct_->fetch_storage(held_[k].state.impl);
  }
}

// One kind of question for many tensors, then the next kind: torch's code for each fills the caches
// of instructions and branches.
bool Watch::look_at(size_t begin, size_t end) {
  for (size_t t = begin; t < end; ++t) {
    Member& m = members_[t];
    if (!asks_directly(m)) continue;
    if (direct_->impl_of(m.param.tensor) != m.param.impl) return false;
    m.place = direct_->grad_of(m.param.impl);
    m.present = m.place != nullptr;
    if (m.present) direct_->fetch_impl(*m.place);
  }
  for (size_t t = begin; t < end; ++t)
    if (!same(members_[t].param)) return false;
  for (size_t t = begin; t < end; ++t) {
    const Member& m = members_[t];
    if (asks_directly(m) && m.present) direct_->fetch_storage(*m.place);
    for (size_t k = m.first; k < m.last; ++k)
      if (PyDict_GetItemWithError(m.states, held_[k].key) != held_[k].state.tensor) return false;
  }
  for (size_t k = members_[begin].first; k < members_[end - 1].last; ++k)
    if (!same(held_[k].state)) return false;
  for (size_t t = begin; t < end; ++t)
    if (!same_grad(&members_[t], &addresses_[t])) return false;
  return true;
}

const void* const* Watch::look(const py::list& groups, const py::dict& state) {
  const size_t n = members_.size();
  const auto block = [n](size_t i) { return std::min(n, i * kBlock); };
  const auto fetch = [&](size_t i) {  // block i and, less of it, the next one
    if (direct_ == nullptr) return;
    fetch_objects(block(i + 1), block(i + 2));
    fetch_storages(block(i), block(i + 1));
  };
  if (direct_ != nullptr) fetch_objects(0, block(1));
  if (!same_lists(groups) || !same_dicts(state)) return nullptr;
  fetch(0);
  for (size_t i = 0; block(i) < n; ++i) {
    fetch(i + 1);
    if (!look_at(block(i), block(i + 1))) return nullptr;
  }
  return addresses_.data();
}

void Watch::count_written() {
  py::list others;
  const auto count = [&](const Known& x) {
    if (x.impl != nullptr && direct_->impl_of(x.tensor) == x.impl)
      direct_->count_write(&x.impl);
    else
      others.append(py::handle(x.tensor));
  };
  for (const Member& m : members_)
    if (m.present) count(m.param);
  for (const Known& root : roots_) count(root);
  increment_version(others);
}

}  // namespace pysmooth

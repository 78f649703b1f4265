// What a step asks of torch: which parameters have gradients, where, and whether all else is still
// as the plan knows it.
//
// One kind of question for many tensors, then the next kind: asking all of them about one tensor
// and then about the next takes half as long again, because torch's code for each fills the caches
// of instructions and branches. Most questions need no Python object, and are asked by all threads,
// while the one that holds the GIL waits for them.

#include <algorithm>

#include "bindings/plan.h"
#include "bindings/run_released.h"

namespace pysmooth {

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

Plan::Tracked Plan::track(PyObject* tensor, const DLTensor& told) {
  Tracked out;
  out.tensor = tensor;
  out.impl = direct_ == nullptr ? nullptr : direct_->impl_of_plain(tensor);
  DLTensor seen;
  if (out.impl == nullptr || !direct_->read(&out.impl, &seen)) {
    out.impl = nullptr;
    seen = told;
  }
  out.data = seen.data;
  out.form = forms_.of(seen);
  return out;
}

bool Plan::same(size_t t, int k) const {
  const Tracked& x = known(entries_[t], k);
  DLTensor d;
  if (x.impl != nullptr) {
    if (direct_->impl_of(x.tensor) != x.impl || !direct_->read(&x.impl, &d)) return false;
  } else {
    shared_reader().read(x.tensor, &d,
                         [&] { return (k == 0 ? "" : "a state of ") + what("parameter", t); });
  }
  return d.data == x.data && x.form->same_form(d);
}

bool Plan::asked(size_t t, int k) const {
  const Slot& slot = pipeline_.slots[t];
  // Accumulated norms are written for tensors without gradient too.
  return (slot.active || slot.norm_sq != nullptr) && k <= entries_[t].states_held;
}

// A state's object is alive if its dict still holds it.
bool Plan::holds_states(size_t t) const {
  const Entry& e = entries_[t];
  for (int k = 1; k <= e.states_held; ++k)
    if (PyDict_GetItemWithError(e.state_dict, e.keys[k - 1]) != known(e, k).tensor) return false;
  return true;
}

bool Plan::unmoved(size_t t) const {
  const Entry& e = entries_[t];
  if (e.states_held != e.expected_states || !same(t, 0) || !holds_states(t)) return false;
  for (int k = 1; k <= e.states_held; ++k)
    if (!same(t, k)) return false;
  return true;
}

// Lazy conjugates and negatives ride on complex tensors and on the strided views of their parts; of
// those only a view of one element looks dense (as_strided on a negated view could make others).
// This is where torch cannot be asked directly: through Python it would cost as much as reading.
bool Plan::may_be_lazy(size_t t) const {
  const Slot& slot = pipeline_.slots[t];
  return slot.layout != nullptr || slot.numel == 1 ||
         entries_[t].grad_form->dtype.code == kDLComplex;
}

// By its Python object.
void Plan::read_gradient(size_t t) {
  Entry& e = entries_[t];
  Slot& slot = pipeline_.slots[t];
  DLTensor d;
  const auto read = [&] {
    shared_reader().read(grads_[t].ptr(), &d, [&] { return what("gradient of parameter", t); });
    if (e.grad_form == nullptr || !e.grad_form->same_form(d)) learn_gradient(t, d);
  };
  read();
  const void* const impl = direct_ == nullptr ? nullptr : direct_->impl_if_exact(grads_[t].ptr());
  if (impl != nullptr && direct_->tells_lazy() ? direct_->lazy(&impl)
                                               : may_be_lazy(t) && has_lazy_bits(grads_[t].ptr())) {
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

bool Plan::begin() {
  for (size_t t = 0; t < entries_.size(); ++t) states_there_[t] = holds_states(t);
  return true;
}

// Here and in check(), which any thread may run, are tensors that can be asked without Python's
// objects, and gradients of a form that is known; the others are left to finish(). An address is
// of one device: what has not moved is where it was.
void Plan::look(size_t begin, size_t end) {
  for (size_t t = begin; t < end; ++t) {
    const Tracked& param = known(entries_[t], 0);
    __builtin_prefetch(param.tensor);
    Direct::fetch_impl(param.impl);
  }
  for (size_t t = begin; t < end; ++t) {
    Entry& e = entries_[t];
    Slot& slot = pipeline_.slots[t];
    const Tracked& param = known(e, 0);
    const bool sums = e.sums != nullptr && trusts_sums_;  // which know a gradient by its object
    left_[t] = param.impl == nullptr || sums || pipeline_.absorbs;
    slot.summed = false;
    e.grad = nullptr;
    if (left_[t]) continue;
    if (direct_->impl_of(param.tensor) != param.impl) {
      stale_ = true;
      return;
    }
    e.grad = direct_->grad_of(param.impl);
    slot.active = e.grad != nullptr && slot.elements > 0;
    if (e.grad != nullptr) Direct::fetch_impl(*e.grad);
    if (!slot.active) some_inactive_ = true;
  }
  const auto looked_at = [this](size_t t) { return !left_[t] && asked(t, 0); };
  // First what the plan knows: a gradient is judged against a parameter that is still the same.
  for (size_t t = begin; t < end; ++t)
    if (looked_at(t) && direct_->data_of(&known(entries_[t], 0).impl) != known(entries_[t], 0).data)
      stale_ = true;
  for (size_t t = begin; t < end; ++t)
    if (looked_at(t) && pipeline_.slots[t].active)
      pipeline_.slots[t].grad = direct_->data_of(entries_[t].grad);
  DLTensor d;
  for (size_t t = begin; t < end; ++t) {
    const Entry& e = entries_[t];
    const Tracked& param = known(e, 0);
    if (looked_at(t) && (e.states_held != e.expected_states ||
                         !direct_->read_form(&param.impl, &d) || !param.form->same_form(d)))
      stale_ = true;
  }
  for (size_t t = begin; t < end; ++t) {
    const Entry& e = entries_[t];
    const Slot& slot = pipeline_.slots[t];
    if (left_[t] || !slot.active) continue;
    __builtin_prefetch(slot.grad);
    left_[t] = e.grad_form == nullptr || slot.grad == nullptr ||
               !direct_->read_device(e.grad, &d) || !direct_->read_form(e.grad, &d) ||
               !e.grad_form->same_form(d) ||
               (direct_->tells_lazy() ? direct_->lazy(e.grad) : may_be_lazy(t));
  }
}

void Plan::check(size_t begin, size_t end) {
  for (int k = 1; k <= most_states_ && !stale_; ++k) {
    for (size_t t = begin; t < end; ++t) {
      if (left_[t] || !asked(t, k)) continue;
      const Tracked& state = known(entries_[t], k);
      if (!states_there_[t]) stale_ = true;
      left_[t] = state.impl == nullptr;
      __builtin_prefetch(state.tensor);
      Direct::fetch_impl(state.impl);
    }
    if (stale_) return;
    const auto looked_at = [this, k](size_t t) { return !left_[t] && asked(t, k); };
    for (size_t t = begin; t < end; ++t) {
      const Tracked& state = known(entries_[t], k);
      if (looked_at(t) && (direct_->impl_of(state.tensor) != state.impl ||
                           direct_->data_of(&state.impl) != state.data))
        stale_ = true;
    }
    if (stale_) return;
    DLTensor d;
    for (size_t t = begin; t < end; ++t) {
      const Tracked& state = known(entries_[t], k);
      if (looked_at(t) && (!direct_->read_form(&state.impl, &d) || !state.form->same_form(d)))
        stale_ = true;
    }
  }
}

bool Plan::finish() {
  if (stale_) return false;
  for (size_t t = 0; t < entries_.size(); ++t) {
    if (!left_[t]) continue;
    Slot& slot = pipeline_.slots[t];
    entries_[t].grad = nullptr;
    if (pipeline_.absorbs) {
      slot.absorbed = slot.active = slot.numel > 0 && absorbed(t) > 0;
      slot.layout = shapes_[t].own_layout.linear() ? nullptr : &shapes_[t].own_layout;
    } else {
      grads_[t] = grad_of_(param_list_[t]);
      slot.active = !grads_[t].is_none() && slot.elements > 0;
    }
    if (!slot.active) some_inactive_ = true;
    if (asked(t, 0) && !unmoved(t)) return false;
    if (slot.active && !pipeline_.absorbs) read_gradient(t);
  }
  // Whoever wrote to one gradient behind torch's back may have written to others.
  if (!trusts_sums_)
    for (Slot& slot : pipeline_.slots) slot.summed = false;
  if (some_inactive_ || !all_active_) list_written();
  all_active_ = !some_inactive_;
  if (!keeps_gil(pipeline_)) hold();
  return true;
}

// Autograd is told of the others by list_written().
void Plan::wrote(size_t begin, size_t end) {
  for (size_t t = begin; t < end; ++t) {
    const Tracked& param = known(entries_[t], 0);
    if (pipeline_.slots[t].active && param.impl != nullptr) direct_->count_write(&param.impl);
  }
}

// Other threads may replace what nobody has a reference to, once they get the GIL.
void Plan::hold() {
  for (size_t t = 0; t < entries_.size(); ++t) {
    const Entry& e = entries_[t];
    if (!pipeline_.slots[t].active || known(e, 0).impl == nullptr) continue;
    held_params_.push_back(direct_->hold(&known(e, 0).impl));
    if (e.grad != nullptr) held_grads_.push_back(direct_->hold(e.grad));
  }
}

void Plan::let_go() {
  for (py::object& grad : grads_) grad = py::object();
  for (std::vector<Handle>* const held : {&held_params_, &held_grads_}) {
    for (const Handle handle : *held) direct_->release(handle);
    held->clear();
  }
}

// What autograd is to be told of by its Python object. States come as the roots of their views.
void Plan::list_written() {
  written_ = py::list();
  for (size_t t = 0; t < entries_.size(); ++t)
    if (pipeline_.slots[t].active && known(entries_[t], 0).impl == nullptr)
      written_.append(py::handle(param_list_[t]));
  for (const py::handle root : state_roots_) written_.append(root);
}

}  // namespace pysmooth

// What a step asks of torch: which parameters have gradients, where, and whether all else is still
// as the plan knows it.
//
// One kind of question for many tensors, then the next kind: asking all of them about one tensor
// and then about the next takes half as long again, because torch's code for each fills the caches
// of instructions and branches.

#include <algorithm>

#include "bindings/plan.h"
#include "bindings/run_released.h"

namespace pysmooth {
namespace {

// A TensorImpl, which its reader will find in cache.
void prefetch_impl(const void* impl) {
  if (impl == nullptr) return;
  for (int line = 0; line < 4; ++line)
    __builtin_prefetch(static_cast<const char*>(impl) + 64 * line);
}

}  // namespace

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

Plan::Tracked Plan::track(PyObject* tensor, const DLTensor& told) const {
  Tracked out{tensor, direct_ == nullptr ? nullptr : direct_->impl_of_plain(tensor), {}};
  DLTensor seen;
  if (out.impl != nullptr && direct_->read(&out.impl, &seen)) {
    out.form.assign(seen);
  } else {
    out.impl = nullptr;
    out.form.assign(told);
  }
  return out;
}

bool Plan::same(size_t t, int k) const {
  const Tracked& x = known(entries_[t], k);
  DLTensor d;
  if (x.impl != nullptr)
    return direct_->impl_of(x.tensor) == x.impl && direct_->read(&x.impl, &d) && x.form.same(d);
  shared_reader().read(x.tensor, &d,
                       [&] { return (k == 0 ? "" : "a state of ") + what("parameter", t); });
  return x.form.same(d);
}

bool Plan::unmoved(size_t begin, size_t end, bool all) const {
  const auto asked = [&](size_t t, int k) {
    const Slot& slot = pipeline_.slots[t];
    // Accumulated norms are written for tensors without gradient too.
    return (all || slot.active || slot.norm_sq != nullptr) && k <= entries_[t].states_held;
  };
  for (size_t t = begin; t < end; ++t)
    if (asked(t, 0) && (entries_[t].states_held != entries_[t].expected_states || !same(t, 0)))
      return false;
  for (int k = 1; k <= most_states_; ++k) {
    // A state's object is alive if its dict still holds it.
    for (size_t t = begin; t < end; ++t) {
      if (!asked(t, k)) continue;
      const Entry& e = entries_[t];
      if (PyDict_GetItemWithError(e.state_dict, e.keys[k - 1]) != known(e, k).tensor) return false;
    }
    for (size_t t = begin; t < end; ++t)
      if (asked(t, k) && !same(t, k)) return false;
  }
  return true;
}

bool Plan::find_gradient(size_t t) {
  Slot& slot = pipeline_.slots[t];
  slot.summed = false;
  if (pipeline_.absorbs) {
    slot.absorbed = slot.active = slot.numel > 0 && absorbed(t) > 0;
    slot.layout = shapes_[t].own_layout.linear() ? nullptr : &shapes_[t].own_layout;
    return true;
  }
  Entry& e = entries_[t];
  const Tracked& param = known(e, 0);
  const bool sums = e.sums != nullptr && trusts_sums_;  // which know a gradient by its object
  e.grad = nullptr;
  if (param.impl != nullptr && !sums) {
    if (direct_->impl_of(param.tensor) != param.impl) return false;
    e.grad = direct_->grad_of(param.impl);
    slot.active = e.grad != nullptr && slot.elements > 0;
    if (e.grad != nullptr) prefetch_impl(*e.grad);
  } else {
    grads_[t] = grad_of_(param.tensor);
    slot.active = !grads_[t].is_none() && slot.elements > 0;
  }
  return true;
}

// Lazy conjugates and negatives ride on complex tensors and on the strided views of their parts; of
// those only a view of one element looks dense (as_strided on a negated view could make others, and
// is on its own). Asking every gradient would cost as much as reading it.
bool Plan::may_be_lazy(size_t t) const {
  const Slot& slot = pipeline_.slots[t];
  return slot.layout != nullptr || slot.numel == 1 ||
         entries_[t].grad_form.dtype.code == kDLComplex;
}

void Plan::learn_if_new(size_t t, const DLTensor& grad) {
  const Entry& e = entries_[t];
  if (!e.grad_known || !e.grad_form.same_form(grad)) learn_gradient(t, grad);
}

void Plan::read_gradient(size_t t) {
  Entry& e = entries_[t];
  Slot& slot = pipeline_.slots[t];
  DLTensor d;
  bool seen = false;
  if (e.grad != nullptr && !(e.grad_known && may_be_lazy(t)) && direct_->read(e.grad, &d)) {
    learn_if_new(t, d);
    seen = !may_be_lazy(t);
  }
  if (!seen) {
    if (e.grad != nullptr) grads_[t] = grad_of_(param_list_[t]);
    e.grad = nullptr;
    const auto read = [&] {
      shared_reader().read(grads_[t].ptr(), &d, [&] { return what("gradient of parameter", t); });
      learn_if_new(t, d);
    };
    read();
    if (may_be_lazy(t) && has_lazy_bits(grads_[t].ptr())) {
      grads_[t] = grads_[t].attr("resolve_conj")().attr("resolve_neg")();
      read();
    }
  }
  slot.grad = d.data;
  __builtin_prefetch(slot.grad);
  if (e.sums != nullptr && trusts_sums_ && slot.rows == nullptr) find_sums(t, d);
}

void Plan::find_sums(size_t t, const DLTensor& grad) {
  const auto first = static_cast<size_t>(pipeline_.chunks.first(static_cast<int64_t>(t)));
  const Kept kept = entries_[t].sums->find(grads_[t], grad, pipeline_.partials.data() + first);
  pipeline_.slots[t].summed = kept == Kept::valid;
  if (kept == Kept::tampered) trusts_sums_ = false;
}

bool Plan::gather() {
  constexpr size_t kBlock = 128;  // stays in L2 from one question to the next
  constexpr size_t kAhead = 8;
  bool all_active = true;
  for (size_t begin = 0; begin < entries_.size(); begin += kBlock) {
    const size_t end = std::min(entries_.size(), begin + kBlock);
    for (size_t t = begin; t < end; ++t) {
      if (t + kAhead < entries_.size()) {
        const Tracked& later = known(entries_[t + kAhead], 0);
        __builtin_prefetch(later.tensor);
        prefetch_impl(later.impl);
      }
      if (!find_gradient(t)) return false;
      all_active = all_active && pipeline_.slots[t].active;
    }
    // First what the plan knows: a gradient is judged against a parameter that is still the same.
    if (!unmoved(begin, end, false)) return false;
    for (size_t t = begin; t < end; ++t)
      if (pipeline_.slots[t].active && !pipeline_.absorbs) read_gradient(t);
  }
  // Whoever wrote to one gradient behind torch's back may have written to others.
  if (!trusts_sums_)
    for (Slot& slot : pipeline_.slots) slot.summed = false;
  if (!all_active || !all_active_) list_written();
  all_active_ = all_active;
  if (!keeps_gil(pipeline_)) hold();
  return true;
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

void Plan::count_written() {
  increment_version(written_);
  for (const Handle param : held_params_) direct_->count_write(param);
  if (!held_params_.empty()) return;
  for (size_t t = 0; t < entries_.size(); ++t) {
    const Tracked& param = known(entries_[t], 0);
    if (pipeline_.slots[t].active && param.impl != nullptr) direct_->count_write(&param.impl);
  }
}

}  // namespace pysmooth

// Whether everything is where it was when a plan was made, and where the gradients are: parameters,
// their states, the form of their gradients.
#pragma once

#include <utility>
#include <vector>

#include "bindings/direct.h"
#include "bindings/state_snapshot.h"
#include "bindings/tensor_reader.h"

namespace pysmooth {

class Watch {
 public:
  // Per parameter: `grads` has a tensor of the form that its gradient is to have, or None: it has
  // none yet, and is to have none; `state_dicts` and `state_keys`, the states that count. `state`
  // is the optimizer's, `roots` are the tensors that the states are views of. `aligns`: whether a
  // gradient has to begin at a 16-byte boundary where its form does, and only there.
  Watch(const py::list& params, const py::list& grads, const py::list& state_dicts,
        const py::list& state_keys, const py::dict& state, const py::list& roots, bool aligns);

  // The address of every gradient, null for none and for empty ones. Null where anything is not as
  // it was, or cannot be told.
  const void* const* look(const py::list& groups, const py::dict& state);
  // Whether the states are in the dicts that they were in.
  bool same_dicts(const py::dict& state) const { return dicts_.same(state); }
  size_t size() const { return members_.size(); }
  // Tells autograd that states were written, and all parameters which had a gradient.
  void count_written();

 private:
  // A parameter or a state, its TensorImpl where that can be asked directly, and what it was.
  struct Known {
    PyObject* tensor = nullptr;  // owned by owned_
    const void* impl = nullptr;
    Signature form;
  };
  struct Held {
    PyObject* key;
    Known state;
  };
  // Plain data in one piece: after a backward pass every cache line counts.
  struct Member {
    Known param;
    Signature grad;  // ndim -1: it is to have none
    DLDevice device = {};
    bool aligned = false, empty = false, lazy = false;
    bool present = false;        // in this step
    Handle place = nullptr;      // of its gradient, in this step or the last one
    PyObject* states = nullptr;  // the optimizer's, of this parameter
    size_t first = 0, last = 0;  // into held_
  };
  Known known(const py::handle& tensor);
  bool asks_directly(const Member& m) const {
    return m.param.impl != nullptr && (!m.lazy || direct_->tells_lazy());
  }
  void know_grad(const py::handle& grad, Member* m) const;
  bool same(const Known& x) const;
  bool same_lists(const py::list& groups) const;
  bool same_grad(Member* m, const void** address);
  bool look_at(size_t begin, size_t end);
  void fetch_objects(size_t begin, size_t end) const;
  void fetch_storages(size_t begin, size_t end) const;

  const Direct* direct_ = Direct::get();
  py::list owned_;
  std::vector<Member> members_;
  std::vector<Held> held_;
  std::vector<Known> roots_;
  std::vector<const void*> addresses_;
  StateSnapshot dicts_;
  bool aligns_;
  AttributeGetter grad_of_{"grad"};
};

}  // namespace pysmooth

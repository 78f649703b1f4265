// Whether everything is where it was when a plan was made, for engines that are written in Python:
// parameters, their states, the form of their gradients.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "bindings/direct.h"
#include "bindings/state_snapshot.h"
#include "bindings/tensor_reader.h"

namespace pysmooth {

class Watch {
 public:
  // `grads`: per parameter a tensor of the form that its gradient is to have, or None: it has none
  // yet, and is to have none. `keys`: of the states that count.
  Watch(const py::list& params, const py::list& grads, const py::dict& state,
        const std::vector<std::string>& keys);

  // Addresses of all gradients, 64 bits each, 0 for none and for empty ones. None where anything
  // is not as it was, or cannot be told.
  py::object look(const py::list& groups, const py::dict& state);
  bool all_present() const { return present_ == members_.size(); }

 private:
  // A tensor, its TensorImpl where it can be asked directly, and where it was.
  struct Known {
    py::object tensor;
    const void* impl;
    void* address;
  };
  struct Held {
    py::str key;
    Known state;
  };
  struct Member {
    Known param;
    Signature grad;  // ndim -1: none
    bool aligned = false, empty = false, lazy = false;
  };
  struct Entry {
    py::dict states;  // the optimizer's, of one parameter
    std::vector<Held> held;
  };
  Known known(const py::object& tensor) const;
  bool same(const Known& x) const;
  bool same_params(const py::list& groups) const;
  bool same_states(const py::dict& state) const;
  bool same_grad(const Member& m, int64_t* address);

  const Direct* direct_ = Direct::get();
  std::vector<Member> members_;
  std::vector<Entry> entries_;
  StateSnapshot dicts_;
  size_t present_ = 0;
  AttributeGetter grad_of_{"grad"};
};

void bind_watch(py::module_& m);

}  // namespace pysmooth

// What does not change from step to step, for parameters on GPUs.
//
// As the CPU module's Plan: a step re-reads gradient addresses, compares the rest with what it
// knows, and reports itself stale when something else changed. Memory is the caller's, in torch
// tensors; nothing here waits for the device.
//
// Arguments were checked before (pysmooth/engine/checks.py): shapes, state dtypes, shared memory.
#pragma once

#include <deque>
#include <memory>
#include <tuple>

#include "bindings/cuda/site.h"
#include "bindings/direct.h"
#include "bindings/row_cut.h"
#include "bindings/tensor_reader.h"
#include "bindings/watch.h"

namespace pysmooth::cuda {

// Of a parameter that is a part of a larger one, over several processes: elements of that, where
// this part begins if coordinates are selected from all parts (else -1), and, where it is empty,
// whether it takes part in steps.
using PartOf = std::tuple<int64_t, int64_t, bool>;

class StepPlan {
 public:
  // `grads`: a tensor of the form that each parameter's gradient will have. States are all there
  // or, for a parameter that never had a gradient, all missing. `state` is the optimizer's.
  // `sites`: at which device each is. `parts`: none where parameters are whole; `joins`: the
  // process is a stage of a pipeline.
  StepPlan(const py::list& params, const py::list& grads, const py::dict& state,
           const py::list& state_dicts, const py::list& state_keys,
           const std::vector<std::string>& rules, const std::vector<int>& groups,
           std::vector<std::string> names, const std::vector<bool>& first,
           const std::vector<int>& param_storage, const std::vector<bool>& by_rows,
           const py::list& state_roots, int scope, int policy, double norm_type,
           const std::vector<int>& stage_scopes, const py::object& select,
           const std::vector<int64_t>& absorbed, const std::vector<int>& sites,
           const std::vector<PartOf>& parts, bool joins);

  std::vector<Site>& sites() { return sites_; }

  // Enqueues a step of an optimizer's groups, where there is one site; false: stale, and nothing
  // happened. `hypers` holds numbers, and tensors on the device for those that kernels are to read
  // there. `inputs`: input_bytes() of memory there.
  bool step(const py::list& groups, const py::dict& state, const py::list& hypers,
            const py::list& clips, const py::object& grad_scale, const py::object& found_inf,
            uintptr_t inputs, uintptr_t stream);
  // The same where there are several, or processes: begin(), which takes the gradients or says that
  // the plan is stale; for each phase, at every site, enqueue(), which says how many phases there
  // are; and end() in any case. Between two phases comes meeting(), of the first one.
  bool begin(const py::list& groups, const py::dict& state);
  int enqueue(size_t site, int phase, const py::list& hypers, const py::list& clips,
              const py::object& grad_scale, const py::object& found_inf, uintptr_t inputs,
              uintptr_t stream);
  std::tuple<Meeting, bool, int> meeting(int phase) const;
  // Lets gradients go and, if the step is `done`, tells autograd what was written.
  void end(bool done);

  // Where gradients are absorbed: whether all that belongs to parameter t is as the plan has it,
  // its gradient included; then, enqueues what takes that in. `once`: hyper-parameters, as bits,
  // that are 0 for all but the first one of a step.
  bool holds(size_t t);
  void absorb(size_t t, const py::tuple& hyper, const py::tuple& clip, uint32_t once,
              uintptr_t stream);

 private:
  struct Tracked {
    PyObject* tensor;  // a parameter's is owned by params_; a state's is looked up first
    const void* impl;  // behind `tensor`, if it still is; null: not to be asked directly
    Signature form;
  };
  struct Entry {
    size_t tracked = 0;  // into tracked_: the parameter, then its states
    int expected = 0, held = 0;
    Signature grad;
    Handle given = nullptr;  // the gradient in this step, where it is asked directly
  };

  std::string label(size_t t) const { return "parameter '" + names_[t] + "'"; }
  void track(size_t t, PyObject* tensor, const std::string& what);
  void read_states(size_t t, Tensor* out);
  void read_layouts(size_t t, bool by_rows, Tensor* out);
  bool same_lists(const py::list& groups) const;
  const Tracked& known(size_t t, int k) const {
    return tracked_[entries_[t].tracked + static_cast<size_t>(k)];
  }
  bool same(size_t t, int k) const;
  bool find_gradient(size_t t);
  bool unmoved(size_t begin, size_t end) const;
  bool read_gradient(size_t t);
  bool gather();
  bool find_one(size_t t);
  void note_written();

  py::list params_, state_dicts_, state_keys_, state_roots_, written_;
  AttributeGetter grad_of_{"grad"};
  const Direct* direct_ = Direct::get();
  std::vector<std::string> names_;
  std::vector<Entry> entries_;
  std::vector<Tracked> tracked_;
  std::deque<Layout> layouts_;
  std::deque<pysmooth::RowCut> rows_;
  std::vector<size_t> group_sizes_;
  std::vector<Site> sites_;
  std::vector<int> site_of_;
  int most_states_ = 0;
  bool absorbs_ = false;
  std::unique_ptr<Watch> watch_;
  bool watched_ = false;  // it saw this step's gradients, and all was as it was
  // Of the step: kept alive until all is enqueued.
  std::vector<py::object> grads_;
  std::vector<const void*> addresses_;
  const void* const* found_ = nullptr;  // of this step: those, or the watch's
  std::vector<char> active_, written_for_;
  std::vector<GroupInput> inputs_;
};

// Index of a rule by name in the kernels' table.
int find_rule(const std::string& name);

}  // namespace pysmooth::cuda

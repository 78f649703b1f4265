// A Plan: the part of a step that does not change from step to step.
//
// Built once from an optimizer's parameters and states, it holds sizes, dtypes, the chunk table and
// the addresses of everything but gradients. A step re-reads gradient addresses, compares the rest
// with what it knows, and reports itself stale when something else changed.
#pragma once

#include <atomic>
#include <deque>
#include <memory>

#include "bindings/backward_sums.h"
#include "bindings/direct.h"
#include "bindings/exchange.h"
#include "bindings/forms.h"
#include "bindings/row_cut.h"
#include "cpu/run.h"

namespace pysmooth {

class Plan final : private Gather {
 public:
  Plan(const py::list& params, const py::list& state_dicts, const py::list& state_keys,
       const std::vector<std::string>& rules, const std::vector<int>& groups,
       std::vector<std::string> names, const std::vector<bool>& first, const py::list& state_roots,
       int scope, int policy, double norm_type, const std::vector<int>& stage_scopes,
       const py::object& select, const std::vector<int>& low_states,
       const std::vector<int>& param_storage, const std::vector<bool>& by_rows,
       const py::list& sums, bool absorbs);

  // Runs one step. `param_lists` holds each group's list of parameters, to notice replaced ones;
  // `hypers` and `clips` the numbers of each group; `trusts_sums`: whether sums from backward may
  // be used. Returns an Outcome.
  int step(const py::list& param_lists, const py::list& hypers, const py::list& clips, int threads,
           double unscale, bool trusts_sums);

  // Takes parameter t's gradient into its states, and frees it. Returns an Outcome.
  int absorb(size_t t, const py::tuple& hyper, const py::tuple& clip, int threads);

  std::vector<double> norms() const { return pipeline_.norms; }
  std::vector<double> coefs() const { return pipeline_.coefs; }
  std::vector<bool> active() const;
  // Of how many gradients the last step had the sums from backward.
  int64_t summed() const;
  // How many top-k selections there were, and how many needed a second look at the values.
  std::pair<int64_t, int64_t> selections() const {
    return {pipeline_.staged.selections, pipeline_.staged.second_looks};
  }
  bool reduced() const { return pipeline_.reduced; }
  // Whether the last call of step() did what it was asked, for who did not get to see its result.
  bool applied() const { return applied_; }
  // Has sums go through `exchange` (pysmooth.engine.exchange.Exchange) from now on; `elements`: of
  // each whole tensor; `jointly`: whether top-k looks at all parts of a tensor.
  void set_exchange(const py::object& exchange, const std::vector<int64_t>& elements, bool jointly);
  std::vector<std::string> nonfinite_names() const;

 private:
  // Hot, and plain data in one piece: after a backward pass every cache line counts.
  struct Tracked {               // a parameter or a state, and what it was when the plan was made
    PyObject* tensor = nullptr;  // a parameter's is owned by params_; a state's is looked up first
    const void* impl = nullptr;  // behind `tensor`, if it still is; null: not to be asked directly
    const void* data = nullptr;
    const Form* form = nullptr;  // in forms_
  };
  struct Entry {
    PyObject* state_dict = nullptr;   // owned by state_dicts_
    PyObject* const* keys = nullptr;  // of a tuple of state_keys_; numbers come last
    BackwardSums* sums = nullptr;     // owned by sums_; null: none are taken
    Handle grad = nullptr;            // in this step, where it is asked directly
    const Form* grad_form = nullptr;  // in forms_; null: not known yet
    uint32_t tracked = 0;             // into tracked_: the parameter, then its states
    int16_t expected_states = 0, states_held = 0;
  };
  // Cold: read when a plan is built or a gradient changes its form.
  struct Shape {
    RealView view;
    Layout layout, grad_layout;
    Layout own_layout;             // as `layout`, of all but the gradient
    std::unique_ptr<RowCut> rows;  // of tensors that are clipped by rows
  };

  std::string what(const char* kind, size_t t) const { return kind + (" '" + names_[t] + "'"); }
  void read_number(size_t t, int index, const RealView& view, void* data, const std::string& name);
  void read_storage(size_t t, int storage);
  void read_states(size_t t, const py::tuple& keys, int low);
  int tensor_states(size_t t) const;  // the rule's, and the parameter's companion
  void learn_gradient(size_t t, const DLTensor& grad);
  bool unchanged(const py::list& param_lists) const;
  // Gather.
  bool begin() override;
  size_t tensors() const override { return entries_.size(); }
  void look(size_t begin, size_t end) override;
  void check(size_t begin, size_t end) override;
  bool finish() override;
  void wrote(size_t begin, size_t end) override;

  void hold();
  void let_go();
  void list_written();
  void forget_absorbed();
  void check_aliasing();
  // Of tensor t and its states, k = 0 for the parameter itself.
  const Tracked& known(const Entry& e, int k) const {
    return tracked_[e.tracked + static_cast<size_t>(k)];
  }
  void set_group(size_t g, const py::tuple& hyper, const py::tuple& clip);
  std::vector<const int64_t*> walked(size_t t, const int64_t* grad,
                                     std::deque<RealView>* states) const;
  void learn_own_layout(size_t t);
  int64_t absorbed(size_t t) const;
  // Whether tensors that take part are where and what they were.
  Tracked track(PyObject* tensor, const DLTensor& told);
  bool asked(size_t t, int k) const;
  bool same(size_t t, int k) const;
  bool holds_states(size_t t) const;
  bool unmoved(size_t t) const;
  bool may_be_lazy(size_t t) const;
  void read_gradient(size_t t);
  void find_sums(size_t t, const DLTensor& grad);

  py::list params_, state_dicts_, state_keys_, state_roots_, sums_, written_;
  AttributeGetter grad_of_{"grad"};
  std::vector<std::string> names_;
  std::vector<PyObject*> param_list_;  // params_, as C pointers
  Forms forms_;
  std::vector<Entry> entries_;
  std::vector<Tracked> tracked_;
  std::deque<Shape> shapes_;
  const Direct* direct_ = Direct::get();
  // Kept alive while the kernels run: gradients with Python objects; the others, and parameters.
  std::vector<py::object> grads_;
  std::vector<Handle> held_grads_, held_params_;
  std::vector<size_t> group_sizes_;
  int most_states_ = 0;
  // Of the step that is being gathered. A byte for each tensor: threads write neighbours.
  std::vector<unsigned char> states_there_, left_;
  std::atomic<bool> stale_{false}, some_inactive_{false};
  bool all_active_ = false;
  bool trusts_sums_ = false;
  bool applied_ = false;
  std::unique_ptr<PyExchange> exchange_;
  Pipeline pipeline_;
};

// Index of a rule by name in the kernels' table.
int find_rule(const std::string& name);
void bind_plan(py::module_& m);
void bind_functional(py::module_& m);
void bind_codec(py::module_& m);

}  // namespace pysmooth

// A step as a list of launches, and what has to be in device memory for it. Host code alone:
// nothing here calls CUDA.
//
//   DevicePlan plan(tensors, groups, settings);   once; again when a form or an address changes
//   copy plan.image() to `device`, plan.bytes() of device memory
//   every step: put plan.inputs(...) to `inputs`, plan.input_bytes() of device memory;
//               run plan.launches(...) in order, on one stream
//
// `inputs` may be another piece of memory for each captured graph, so that replays and eager steps
// do not overwrite each other's.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "core/param_storage.h"
#include "core/rows.h"
#include "cuda/kernels.h"
#include "cuda/plan.h"

namespace pysmooth::cuda {

// One parameter. Its gradient's address comes with every step, its form is part of the plan.
struct Tensor {
  int rule = 0, group = 0;  // tensors of a group are consecutive
  int64_t numel = 0;
  void* param = nullptr;
  void* state[kMaxStates] = {};
  DType param_dtype = DType::f32, grad_dtype = DType::f32;
  DType state_dtype[kMaxStates] = {};
  ParamStorage storage = ParamStorage::plain;  // its companion is the state after the rule's
  float* steps =
      nullptr;  // these three where the rule has them (steps: or the storage is stochastic)
  double* norm_sq = nullptr;
  double* scale = nullptr;
  const Layout* layout = nullptr;       // of parameter, gradient, states together; null: linear
  const Layout* grad_layout = nullptr;  // of the gradient alone; null: linear
  const RowShape* rows = nullptr;       // null: not clipped by rows
  bool first = false;                   // no step was applied yet
  int site = 0;                         // the device that all of it lies on
  int64_t elements = 0;                 // of the whole tensor, where this is a part of one
  bool counted = false;                 // where it is an empty one: it takes part in steps
  // Where the k largest are selected from all parts: where this one begins. -1: each by itself.
  int64_t first_element = -1;
  int64_t absorbed = 0;  // gradients that its states took in since the last step
};

struct Settings {
  Scope scope = Scope::global;
  Scope stage_scope[kMaxStages] = {Scope::tensor, Scope::global};
  NonFinite policy = NonFinite::propagate;
  double norm_type = 2.0;
  SelectSpec select;
  bool always_norm = false;
  bool skip_unit_coef = false;  // coefficient 1 leaves the tensor as it is
  bool absorbs = false;         // gradients are taken in one by one, before the step
  int multiprocessors = 132;
  // Tensors may lie on several devices. Each has a plan of all of them, works on its own, and is
  // told of the others' between launches (board.cuh).
  int sites = 1, site = 0;
  // Or they are parts of larger ones, over several processes, which may be stages of a pipeline
  // as well (spread.cuh).
  bool spread = false, joins = false;
};

// The launches of a step that are wanted: all of them, or those that take norms and, later, the
// rest, with the same inputs.
enum class Part { whole, norms, rest };

// What has to be exchanged before the next launch: rows of the board; parts, or numbers of units,
// to be added up, or the largest to be taken; histograms, to be added up.
enum class Meeting { none, devices, parts, units, histograms };

struct Launch {
  Kernel kernel;
  int blocks;
  Work work;
  Meeting meets = Meeting::none;
  bool largest = false;
  int count = 0;  // of units' numbers
};

// A whole step in one launch (single.cuh).
struct Single {
  SingleKernel kernel;
  int blocks;
  Work reducing, applying;
};

class DevicePlan {
 public:
  DevicePlan(const std::vector<Tensor>& tensors, int groups, const Settings& settings);

  size_t bytes() const { return bytes_; }
  std::vector<char> image() const;  // what device memory begins with

  // Throws std::invalid_argument where tensors were to be clipped by rows and are not, or the other
  // way round.
  size_t input_bytes() const;
  std::vector<char> inputs(const void* const* grads, const GroupInput* groups,
                           const StepInput& step) const;

  // Of a step with these inputs. What a launch gets beside its work is view().
  //
  // Where tensors lie on several devices, or in several processes, there are several phases, as
  // many on each. Between two of them comes what the first one's last launch meets for: row s of
  // the board, which site s has written, goes to the same row of all others' boards; or parts,
  // units or histograms are added up over processes, in place.
  std::vector<Launch> launches(void* device, const GroupInput* groups, Part part = Part::whole,
                               int phase = 0) const;
  int phases(const GroupInput* groups, Part part = Part::whole) const {
    return static_cast<int>(meetings(groups, part).size()) + 1;
  }
  std::vector<Launch> meetings(const GroupInput* groups, Part part = Part::whole) const;
  View view(void* device, const void* inputs, const GroupInput* groups) const;

  // The kernel that does a whole step alone; null where steps have more to them than a clip by the
  // Euclidean norm and one rule's apply. It does not run before it is known how many of its blocks
  // are on the device at the same time; with 0 it never does.
  SingleKernel single_kernel() const;
  void run_single(int resident_blocks) { resident_blocks_ = resident_blocks; }
  bool is_single(Part part) const { return resident_blocks_ > 0 && part == Part::whole; }
  Single single(void* device, const GroupInput* groups) const;
  int64_t streamed_bytes() const;  // that a step touches of parameters, gradients and states

  size_t board_at() const { return at_.board; }
  size_t board_row_bytes() const {
    return settings_.sites > 1 ? tensors_.size() * sizeof(Shared) : 0;
  }

  bool is_spread() const { return settings_.spread; }
  size_t parts_at() const { return at_.parts; }    // PartSum, per tensor
  size_t joined_at() const { return at_.joined; }  // double, joined_count()
  size_t joined_count() const {
    return kJoinedUnits + 2 * (tensors_.size() + static_cast<size_t>(groups_) + 1);
  }
  // uint64, per unit of the selection, whose tensors are selecting_tensors().
  size_t histograms_at() const { return at_.histogram; }
  std::vector<int> selecting_tensors() const;

  // What takes a gradient of tensor t into its states: the first launch gets an Intake as well, and
  // both absorbing_view().
  struct Absorption {
    AbsorbKernel admit;
    Work admitted;
    Launch pass;
  };
  Absorption absorption(size_t t) const;
  View absorbing_view(void* device) const;

  // Where results of the last step lie in the device memory, from its beginning.
  size_t torn_at() const { return at_.status + offsetof(Status, torn_tensor); }
  size_t status_at() const { return at_.status; }
  size_t norms_at() const { return at_.norms; }  // double, per scope unit
  size_t coefs_at() const { return at_.coefs; }  // double, per tensor
  size_t nonfinite_at() const { return at_.nonfinite + sizeof(uint32_t) * tensors_.size(); }
  // Tensors whose gradient ever was not finite: uint32, to be set to 0 by whoever was told.
  size_t spoiled_at() const { return nonfinite_at() + sizeof(uint32_t) * tensors_.size(); }
  size_t started_at() const { return at_.started; }  // int32, per tensor: to be carried over
  size_t taken_at() const { return at_.taken; }      // int64, per tensor; only where it absorbs
  size_t units() const { return units_of(settings_.scope); }
  size_t tensors() const { return tensors_.size(); }
  bool absorbs() const { return settings_.absorbs; }
  int sites() const { return settings_.sites; }

 private:
  struct Class {  // tensors that one kernel takes
    int rule;
    Access access;
    std::vector<int> tensors;
  };
  struct Listed {  // items of a launch
    size_t first;
    int count;
  };
  Listed list(const std::vector<int>& tensors, int64_t elements);
  template <class Elements>
  Listed list_each(const std::vector<int>& tensors, Elements elements);
  void cut();
  void cut_rows();
  void cut_units();
  void list_sample();
  size_t place(size_t bytes);
  void cut_blocks();
  bool scales_blocks() const { return settings_.stage_scope[0] == Scope::block; }
  int64_t pass_run() const;  // elements of a partial sum of a pass
  bool reduces(const GroupInput* groups) const;
  std::vector<Launch> all_launches(void* device, const GroupInput* groups, Part part) const;
  bool is_mine(size_t t) const { return tensors_[t].site == settings_.site; }
  bool shares_pass(int stage) const;  // its sums are of several devices' tensors, or of parts
  size_t units_of(Scope scope) const;
  bool selects_jointly() const {
    return std::any_of(units_.begin(), units_.end(), [](const Unit& u) { return u.jointly != 0; });
  }
  Entry entry(size_t t) const;

  std::vector<Tensor> tensors_;
  int groups_;
  Settings settings_;
  bool accumulates_ = false;
  std::vector<Class> classes_;
  std::vector<int32_t> class_of_;  // per tensor
  std::vector<Item> items_;
  std::vector<Layout> layouts_;
  std::vector<int32_t> layout_of_, grad_layout_of_;
  std::vector<int64_t> partial_first_;
  Listed reduce_{}, rows_{}, blocks_{};
  std::vector<int64_t> first_block_;  // per tensor
  int64_t block_count_ = 0;
  std::vector<RowCut> row_cuts_;
  std::vector<int32_t> row_cut_of_;  // per tensor; -1: none
  int64_t row_sums_ = 0, row_chunks_ = 0, row_coef_bytes_ = 0;
  struct Cut {
    Listed source, apply, sample, select;
    int sample_first;  // line
    int apply_rows;
    int64_t signs;  // where its words begin
  };
  std::vector<Cut> cuts_;  // per class
  int64_t sign_words_ = 0;
  std::vector<Unit> units_;
  std::vector<int32_t> unit_of_;       // per tensor; -1: none
  std::vector<int64_t> select_first_;  // per tensor
  std::vector<int64_t> first_mark_;    // per tensor; -1: none
  int64_t mark_words_ = 0;
  int selections_ = 0;  // passes that are selected from
  int sample_lines_ = 0;
  int64_t candidates_ = 0;
  int digits_ = 0;  // of the longest threshold
  int resident_blocks_ = 0;
  size_t bytes_ = 0;
  struct {
    size_t entries, layouts, group_first, partial_first, items, started, status, arrived, nonfinite;
    size_t cuts, units, unit_arrived, taken;
    size_t image;  // the image ends here; what follows needs no first value
    size_t partial, value, norms, coefs, norm_sq, unit_sum, scalars, prepared, signs;
    size_t row_sums, row_coefs, row_total, row_clipped, row_least;
    size_t samples, histogram, candidates, marks, incoming, block_scales, board, parts, joined;
  } at_{};
};

}  // namespace pysmooth::cuda

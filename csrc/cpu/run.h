// One step of a method on CPU: reduce, finalize, apply over a list of slots.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/chunks.h"
#include "core/math/clip.h"
#include "core/step.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/select.h"

namespace pysmooth {

// The ISA levels this CPU can run, lowest first; the kernels in use; a switch for tests.
std::vector<std::string> isa_levels();
const KernelTable& kernels();
void set_isa(const std::string& isa);

// True in a child process made by fork: OpenMP's threads are not there, and work runs serially.
bool in_forked_child();

// One parameter with its gradient and its states. A slot without gradient sits out the step.
struct Slot {
  int rule = 0;  // index into KernelTable::rules
  int group = 0;
  int64_t numel = 0;
  int64_t elements = 0;  // of the whole tensor, of which this may be a part
  DType param_dtype = DType::f32;
  DType grad_dtype = DType::f32;
  bool active = false;
  bool first = false;     // no step applied yet: states hold nothing
  bool absorbed = false;  // the gradient is in the states already; `grad` is not there
  bool summed = false;    // the partials of this step's gradient are there: backward took them
  void* param = nullptr;
  const void* grad = nullptr;
  void* state[kMaxStates] = {};
  DType state_dtype[kMaxStates] = {};
  ParamStorage storage = ParamStorage::plain;  // its companion is the state after the rule's
  double* norm_sq = nullptr;       // of the scope unit; null where the rule accumulates nothing
  double* scale = nullptr;         // stage[0] of the step before; null where the rule keeps none
  float* steps = nullptr;          // how many steps were applied; null where nobody asks
  const Layout* layout = nullptr;  // of parameter, gradient, states together; null: linear
  const Layout* grad_layout = nullptr;  // of the gradient alone; null: linear
  const RowShape* rows = nullptr;       // null: not clipped by rows
};

struct Group {
  double hyper[kMaxHyper] = {};
  Clip clip;
  double clip_value = -1.0;
  bool maximize = false;

  // The rule's derived numbers, for the step count that the group's tensors have in common.
  double step = 0.0;
  double derived[kMaxDerived] = {};
};

enum class Outcome : int { applied = 0, skipped = 1, nonfinite = 2, stale = 3 };

// The other processes, where tensors are cut up among them. The thread that called run_step calls
// these between a pass and what is made of its sums; every process makes the same calls in the same
// order. They must not throw: they set Pipeline::failed, and the step ends there.
class Exchange {
 public:
  virtual ~Exchange() = default;
  // One sum per slot, of the part that is here: becomes that of the tensor. `flags` as well: how
  // many parts have something that is not finite.
  virtual void tensors(Reduction kind, std::vector<double>* sums, std::vector<double>* flags) = 0;
  // One sum per scope unit of tensors: becomes that of the tensors of all pipeline stages.
  virtual void units(Reduction kind, Scope scope, std::vector<double>* sums, double* flag) = 0;
  // How many elements of these slots have which digit, a row for each: become those of the tensors.
  virtual void digits(const std::vector<size_t>& slots, std::vector<int64_t>* histograms) = 0;
  // A count for each: become their sums over the parts that come before this one.
  virtual void before(const std::vector<size_t>& slots, std::vector<int64_t>* counts) = 0;
};

// What the passes before apply need, and what they leave behind.
struct Staged {
  int stages = 0;                          // the most that any active slot's rule has
  std::vector<double> values[kMaxStages];  // per slot: what Scalars::stage is to hold
  std::vector<SourceResult> results;       // per chunk, of the pass that ran last
  // The same of passes that are summed up per block, and where a chunk's blocks begin there.
  std::vector<double> block_values[kMaxStages];
  std::vector<size_t> blocks_at;
  std::vector<SelectUnit> units;
  std::vector<int> unit_of;                    // per slot; -1: none
  std::vector<Picks> lists;                    // per chunk: candidates, then the chosen
  std::vector<PickStore> stores;               // per thread: where the lists lie
  std::vector<std::vector<uint32_t>> tallies;  // per unit: of its candidates
  std::vector<char> active;                    // per slot: selects in this step
  std::vector<int64_t> numels;
  std::unique_ptr<std::atomic<int64_t>[]> kept;  // per unit: candidates kept so far
  std::vector<int64_t> histograms, ties;         // of second looks
  int selected_passes = 0;                       // of how many the values are selected from
  // Of signs or marks, one set of words after another: how many words in a set, where a chunk's
  // are.
  std::vector<uint64_t> bits;
  std::vector<size_t> bits_at;
  int bit_sets = 0;
  // Over the life of the pipeline.
  int64_t selections = 0, second_looks = 0;

  void hand_bits(int64_t chunk, ApplyArgs* args) {
    for (int k = 0; k < bit_sets; ++k)
      args->bits[k] = bits.data() + static_cast<size_t>(k) * bits_at.back() +
                      bits_at[static_cast<size_t>(chunk)];
  }
};

struct Pipeline {
  std::vector<Slot> slots;
  std::vector<Group> groups;
  ChunkTable chunks;
  Scope scope = Scope::global;
  NonFinite policy = NonFinite::propagate;
  double norm_type = 2.0;
  bool absorbs = false;         // gradients are taken in by absorb(), not in the step
  bool accumulates = false;     // some rule accumulates squared norms; norm_type is 2
  bool always_norm = false;     // take norms even where no clip needs them
  bool skip_unit_coef = false;  // coef = 1 leaves the tensor as it is (clip_grad_norm_)
  Scope stage_scope[kMaxStages] = {Scope::tensor, Scope::global};  // of the passes before apply
  SelectSpec select;
  Exchange* exchange = nullptr;  // null: tensors are whole
  bool selects_jointly = false;  // among all parts of a tensor, not in each by itself
  bool failed = false;           // an exchange did
  double unscale = 1.0;  // what gradients are multiplied by before anything else: 1 / loss scale
  // Left behind by a step that took norms.
  std::vector<Partial> partials;                // per chunk
  std::vector<double> sums, flags;              // per slot; flags only where there is an exchange
  std::vector<double> norms;                    // per scope unit
  std::vector<double> coefs;                    // per slot
  std::vector<double> norm_sq_before, norm_sq;  // per slot, where rules accumulate
  bool reduced = false;
  bool nonfinite = false;

  void cut_chunks();
  // Whether a compressor has a scale for every block.
  bool scales_blocks() const { return stage_scope[0] == Scope::block; }

  // Coefficients per row.
  Rows rows;
  // The passes before apply, and selection.
  Staged staged;
};

// What a step asks of its tensors before it starts. It fills in the slots' gradients, and the
// chunks where those are not known before. Asking takes longer than the step where tensors are
// small, so all threads share it. Nothing here may throw; false ends the step as stale.
class Gather {
 public:
  virtual ~Gather() = default;
  // The calling thread's own part, while others already look().
  virtual bool begin() = 0;
  // Of how many tensors look() and those below are to be called, in ranges, on any thread.
  virtual size_t tensors() const { return 0; }
  virtual void look(size_t /*begin*/, size_t /*end*/) {}
  // After begin(), and after look() for these tensors.
  virtual void check(size_t /*begin*/, size_t /*end*/) {}
  // The calling thread again, when all that is done.
  virtual bool finish() { return true; }
  // The step was applied.
  virtual void wrote(size_t /*begin*/, size_t /*end*/) {}
};

// Runs one step. The pool is woken first where there is work for it, and gathering hides the time
// this takes: threads that sleep need some 50 microseconds. A step of few tensors and elements, as
// far as the chunks tell before it is gathered, stays on its thread.
Outcome run_step(Pipeline* pipeline, int threads, Gather* gather);
constexpr int64_t kSerialElements = 16384;
constexpr size_t kManyTensors = 512;  // asked by all threads; fewer are not worth its barriers

// Whether a step reads the gradients first, for norms or to see if all of them are finite.
bool needs_reduce(const Pipeline& pipeline);

// Takes the gradient of slot t into its states: pass 0 of its rule, for this tensor alone. Changes
// nothing where the policy asks, and the gradient is not finite.
Outcome absorb(Pipeline* pipeline, size_t t, int threads);

// The part of reduce that one chunk of a tensor is.
Partial reduce_chunk(const void* data, DType dtype, const Layout* layout, const Chunk& chunk,
                     double norm_type);

// How many threads an operation of torch on the calling thread would use.
int default_threads();

// Runs body(begin, end) over pieces of [0, count) on the shared thread pool.
void parallel_ranges(int64_t count, int64_t grain, int threads,
                     void (*body)(void* context, int64_t begin, int64_t end), void* context);

}  // namespace pysmooth

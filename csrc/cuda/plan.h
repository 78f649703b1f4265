// What kernels are told: a plan, which does not change from step to step, and the step's numbers.
//
// Everything here lies in device memory, but for View and Work, which kernels take by value.
#pragma once

#include <cstdint>

#include "core/layout.h"
#include "core/math/clip.h"
#include "core/random.h"
#include "core/rule.h"
#include "core/step.h"

namespace pysmooth::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 128;  // of a block
constexpr int kWarps = kThreads / kWarp;

// Values are folded in runs, and these in chunks, as the CPU backend does it (cpu/fold.h).
constexpr int kFoldElements = 8192;  // of a gradient
constexpr int kPassElements = 2048;  // of what a pass before apply evaluates
constexpr int kRow = 64;             // lanes of a fold

// Where compressors scale every block of elements by itself: passes that have scales, bytes that a
// block's take, blocks that a warp makes them of.
constexpr int kMostScales = 2, kBlockBytes = kMostScales * 16, kBlocksOfWarp = 256;

// A parameter with its states. Null addresses: there is none.
struct Entry {
  // Parameter, gradient (unused: it comes with the step), states. A rule that reads no gradient
  // rewrites one stream: the parameter or, where that is null, the gradient.
  void* operand[kMaxOperands];
  float* steps;     // how many steps were applied
  double* norm_sq;  // what the rule accumulates
  double* scale;    // stage[0] of the step before
  int64_t numel;
  int64_t elements;      // of the whole tensor, where this is a part of one
  int64_t select_first;  // where its elements begin in its selection's unit
  int64_t first_block;   // of its blocks, where these have scales of their own
  int64_t first_mark;    // into View::marks, its words of each selection; -1: nothing is marked
  int32_t rule, group;
  int32_t layout, grad_layout;  // into View::layouts; -1: linear
  int32_t cut;                  // into View::cuts; -1: not clipped by rows
  int32_t unit;                 // of the selection; -1: nothing is selected here
  int32_t kernels;              // tensors with the same number share their kernels
  int32_t site;                 // the device that it lies on; addresses are that one's
  uint8_t dtype[kMaxOperands];
  uint8_t stochastic;  // operands that are rounded stochastically, as bits
  uint8_t storage;     // ParamStorage; a companion comes after the rule's operands
  uint8_t counted;     // an empty part of a tensor that takes part
};

// A tensor whose gradient is clipped by rows (core/rows.h, rows.cuh).
struct RowCut {
  const void* param;
  int64_t rows, length, run;
  int64_t first_sum;                  // into row_sums
  int64_t first_chunk;                // into what is kept per chunk
  int64_t first_coef;                 // into row_coefs, in bytes
  int32_t runs;                       // of 8,192 elements, of a row's part in a chunk
  int32_t param_layout, grad_layout;  // row after row; -1: linear
  uint8_t param_dtype;
};

// One group's numbers in one step.
struct GroupInput {
  double hyper[kMaxHyper];
  const void* hyper_at[kMaxHyper];  // where not null: read from there instead, float or double
  uint32_t hyper_is_double;         // as bits
  int32_t maximize;
  Clip clip;
  double clip_value;  // bound of coordinates; negative: none
};

struct StepInput {
  double unscale;           // what gradients are multiplied by before anything else
  const float* grad_scale;  // where not null: and divided by
  const float* found_inf;   // where not null, and not 0: nothing happens in this step
};

// A gradient that goes into its states before the step (absorb.cuh).
struct Intake {
  const void* grad;
  int32_t tensor;
  uint32_t once;  // hyper-parameters, as bits, that are 0 for all but the first one of a step
  GroupInput group;
};

// What apply and the passes read of a tensor: the rule's constants, made once per tensor.
constexpr int kHyperBytes = 192;
struct Prepared {
  alignas(16) unsigned char hyper[kHyperBytes];  // Rule::Hyper<C>
  alignas(16) unsigned char take[32];            // GradientIn<C>
  NoiseKey noise;
  Draw draw;
  uint32_t step;  // before this one
  Sum sum[kMaxStages];
  bool reads_param[kMaxStages];
  bool selects, unit_coef;
};

// The k-th largest so far: digits of it that are not known yet are 0.
struct Threshold {
  uint64_t key, place;
  int64_t left;     // how many of those that are equal so far belong to the k
  int32_t settled;  // all of them do
};
constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;
constexpr int kSampleLine = 16;  // elements

struct Candidate {
  uint64_t key;
  int64_t index;  // in the unit
};

// What devices tell each other of a tensor, where a plan's tensors lie on several (board.cuh).
struct Shared {
  double value;           // its sum in this pass
  double clipped, least;  // clipped by rows: what it comes to after that; the least coefficient
  double norm_sq;         // accumulated before this step
  uint32_t nonfinite, unused;
};

// What processes tell each other of a tensor that they hold parts of (spread.cuh). All is added up,
// or the largest taken, as the reduction has it.
struct PartSum {
  double value;          // the part's sum
  double flag;           // not 0: not finite. kIsNan where a maximum would lose it
  double here, missing;  // whether the tensor takes part in this step
};
constexpr double kIsNan = 2.0;
// What the stages of a pipeline tell each other: these, then numbers of units.
enum : int { kJoinedNonfinite, kJoinedNan, kJoinedTorn, kJoinedUnits };

// What is selected from together.
struct Unit {
  int32_t first_tensor, last_tensor;   // [first, last)
  int32_t first_sample, sample_lines;  // lines of the sample; none: every value is a candidate
  int32_t wide, place_bits;            // keys of doubles; bits of an index
  int32_t jointly;                     // with the other parts of a tensor: there is no list
  int64_t first_candidate, room;       // in the list of candidates
  // Of this step.
  int64_t elements, k;
  uint64_t filter;  // least key of a candidate
  unsigned long long candidates;
  int32_t complete;  // the filter lets all values but zeros pass
  Threshold threshold;
};

constexpr int64_t kTornElsewhere = -2;

// Of a plan's last step, and of all of them.
struct Status {
  int32_t skip;  // this step's: nothing was changed
  int32_t nonfinite;
  int32_t torn;  // a tensor takes part in some processes only: nothing was changed, if it was seen
                 // in time
  unsigned long long steps, skipped;  // skipped: by the policy, not by GradScaler
  int64_t torn_tensor;  // 1 + the last such, of all steps; kTornElsewhere: in another stage
};

// Piece `part` of a tensor, for one warp. Its length is the launch's business.
struct Item {
  int32_t tensor, part;
};

struct View {
  const Entry* entries;
  const Layout* layouts;
  const int32_t* group_first;    // groups + 1 tensors: a group's are consecutive
  const int64_t* partial_first;  // of each tensor, into partial
  // The step's numbers. Gradients: null for a tensor that sits out.
  const void* const* grads;
  const GroupInput* inputs;
  const StepInput* step;
  // What kernels leave to each other.
  double* partial;      // per fold
  double* value;        // per tensor: its sum, or what the norm is made of
  uint32_t* nonfinite;  // per tensor: of this step so far, of the last one, of all of them
  uint32_t* arrived;    // per tensor, and one more: blocks of all launches of a pass
  double* norms;        // per scope unit
  double* coefs;        // per tensor
  double* norm_sq;      // per tensor: before, then after this step
  double* unit_sum;     // per scope unit, twice over
  int32_t* started;     // per tensor: its states hold something
  // Where gradients are absorbed, per tensor: how many its states took in since the last step, and
  // the one that they are taking in.
  int64_t* taken;
  const void** incoming;
  Scalars* scalars;    // per tensor
  Prepared* prepared;  // per tensor
  uint32_t* signs;
  Unit* units;
  uint32_t* unit_arrived;
  uint64_t* samples;    // keys
  uint64_t* histogram;  // per unit
  Candidate* candidates;
  uint32_t* marks;  // a bit per element
  SelectSpec select;
  const RowCut* cuts;
  double* row_sums;  // of the parameters' rows, then of the gradients'
  char* row_coefs;   // in the rule's arithmetic, times what unscales
  // Per chunk, of all its elements or of the rows that begin in it; then per cut.
  double* row_total;    // sum of squares before the clip
  double* row_clipped;  // and after
  double* row_least;    // coefficient
  int64_t row_sum_count, row_chunks;
  char* block_scales;              // per block: blocks.cuh
  int32_t block_shift, block_run;  // logarithm of a block's elements; elements of a partial sum
  Status* status;
  Shared* board;   // per device and tensor; null: all tensors lie on this device
  PartSum* parts;  // per tensor; null: all are whole
  double* joined;  // kJoinedNonfinite and what follows; null: there are no stages of a pipeline
  double norm_type;
  int32_t tensors, groups;
  int32_t site;  // this device
  Scope scope, stage_scope[kMaxStages];
  NonFinite policy;
  bool reduces, accumulates, skip_unit_coef;
  bool absorbs;  // gradients are in the states when the step comes: it has none
};

// What one launch is to do.
struct Work {
  const Item* items;
  int64_t first;  // where the signs of this launch begin, in words; or its samples
  int32_t count;
  int32_t rows;    // of 64 elements, per team of threads
  int32_t blocks;  // of all launches of this pass: the last to arrive finishes it
  int32_t stage;
  int64_t piece;   // elements of an item, where a block works on one
  int32_t tensor;  // of a launch for one tensor, which needs no items
};

using Kernel = void (*)(View, Work);
using AbsorbKernel = void (*)(View, Work, Intake);

// How operands lie in registers (access.cuh). A tensor takes the first one that fits.
enum Access : int { kPlain = 0, kMixed = 1, kWide = 2 };
constexpr int kAccesses = 3;

}  // namespace pysmooth::cuda

// The interface between the kernels, compiled once per ISA level, and the code that runs them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/layout.h"
#include "core/param_storage.h"
#include "core/random.h"
#include "core/rule.h"
#include "core/step.h"

namespace pysmooth {

// ---- reduce ------------------------------------------------------------------------------------

struct Partial {
  double value = 0.0;
  bool nonfinite = false;
};

struct ReduceArgs {
  const void* data;      // base of the tensor
  const Layout* layout;  // null: linear
  int64_t begin, length;
  double power;
};
using ReduceFn = Partial (*)(const ReduceArgs&);
// Sums of squares of rows of `row` elements, which lie one after another: one number for each row
// that the chunk holds a part of. Returns their sum.
using RowsFn = Partial (*)(const ReduceArgs&, int64_t row, double* sums);

// ---- apply -------------------------------------------------------------------------------------

// What operand `operand` is multiplied by as it is read: element i, in the order that the tensor is
// walked in, by coefs[i / run % rows].
struct RowCoefs {
  const double* coefs = nullptr;  // null: by nothing
  int64_t rows = 1, run = 1;
  int operand = 1;
};

struct ApplyArgs {
  void* param;  // what rules compute with: the master of a parameter that has one
  const void* grad;
  void* state[kMaxStates];
  DType dtype[kMaxOperands];  // what they are stored as: parameter, gradient, states
  ParamStorage storage;
  int companion;         // the operand that goes with the parameter, after the rule's; 0: none
  const Layout* layout;  // null: linear
  int64_t begin, length;
  const double* hyper;
  Scalars scalars;
  unsigned stochastic;  // operands, as bits, that are rounded stochastically: bfloat16 ones
  NoiseKey noise;
  uint32_t step, tensor;  // steps that the tensor has seen, and its number: what is drawn
  // A bit per element of the chunk: set where negative, or where it was selected. Null: none are
  // kept.
  uint64_t* bits[kMaxSelections];
  RowCoefs rows;
};
using ApplyFn = void (*)(const ApplyArgs&);

// ---- source: a pass before apply ---------------------------------------------------------------

// Coordinates of a chunk that were, or may be, selected.
struct Picks {
  void* values = nullptr;     // in the type that the chunk is computed in
  uint32_t* index = nullptr;  // from the chunk's first element
  int64_t count = 0;
  bool wide = false;  // values are doubles
};
// Kernels handle picks in whole vectors: there is room for so many more than are counted.
constexpr int64_t kPickSlack = 16;

struct SourceTask {
  Sum sum = Sum::none;
  bool reads_param = true;
  double filter = -1.0;  // least magnitude of a candidate; negative: none are wanted
  Picks room;            // for as many candidates as the chunk has elements
};

struct SourceResult {
  double sum = 0.0;
  int64_t candidates = 0;
};

using SourceFn = SourceResult (*)(const ApplyArgs&, const SourceTask&);
// A few consecutive elements of a slot.
struct Stretch {
  size_t slot;
  int64_t begin, length;
};
// The values of pass 0 in stretches of a tensor, widened; nothing is changed. `again`: that pass
// has changed states already.
using ValuesFn = void (*)(const ApplyArgs&, const Stretch* stretches, int64_t count, bool again,
                          double* values);
// Takes in those picks whose magnitude is at least the threshold; the others are dropped. Where
// `fetch` is set all are taken in, and their values are read, and scaled, here.
struct SelectedTask {
  Picks picks;
  double threshold;
  bool fetch;
  double scale;
  uint64_t* marks;  // a bit per element of the chunk, to be set; null: they are taken in
};
using SelectedFn = void (*)(const ApplyArgs&, const SelectedTask&);

struct RuleInfo {
  const char* name;
  int states;
  bool reads_grad;
  bool counts_steps;
  bool accumulates;
  bool keeps_scale;
  bool sends_signs;
  unsigned low_states;
  int stages;      // passes before apply
  int selections;  // of the first passes' values
  bool marks;      // those that were selected, instead of taking them in
  unsigned idle;   // passes, as bits, that change nothing: needless where nothing is summed up
  bool applies;
  bool absorbs;  // gradients, one by one
  Sum (*stage_sum)(const double* hyper, int stage);
  bool (*reads_param)(const double* hyper, int stage);
  bool (*selects_nothing)(const double* hyper);
  double (*accumulate)(const double* hyper, double norm_sq, double sum_squares);
  void (*derive)(const double* hyper, double step, double* derived);
  int hypers;
  const char* hyper[kMaxHyper];
  ApplyFn apply[kComputes];

  // The pairs of dtypes that people train with: gradients like the parameter, or float32, or
  // 16-bit ones (`grad_dtype`) beside float32 parameters.
  bool takes(DType param, DType grad) const {
    if (param == grad) return true;
    if (!reads_grad) return false;
    return grad == DType::f32 || (param == DType::f32 && grad != DType::f64);
  }
};

// What a rule does before apply; null where it does nothing.
struct SourceInfo {
  SourceFn source[kMaxStages][kComputes];
  SourceFn absorbed[kComputes];  // pass 0 where states have taken in the gradient already
  ValuesFn values[kMaxSelections][kComputes];
  SelectedFn selected[kComputes];
};

// ---- probe: bandwidth measurement
// ----------------------------------------------------------------

struct ProbeArgs {
  float* rw[3];
  const float* r[2];
  int64_t begin, length;
};
using ProbeFn = double (*)(const ProbeArgs&);

// ---- codec: what leaves the process -------------------------------------------------------------

// What is coded: x = b * e + a * g; b is 1 or -1.
struct CodedSource {
  const float *g, *e;  // e: null for none
  float a, b;
};

// Room for more than a chunk's elements, since whole vectors are stored.
struct Candidates {
  float* values;
  uint32_t* index;  // of the tensor
  int64_t count;
};

struct CodedChunk {
  CodedSource source;
  int64_t begin, length;  // begin: a multiple of 64
  float* out;             // x, from the tensor's first element; null: not kept
  uint8_t* bits;          // likewise, signs
  double filter;          // least magnitude of a candidate
  Candidates* found;      // null: none are wanted
};

struct SignMessages {
  const uint8_t* const* bits;
  const float* scales;  // null: 1
  int ranks;
};

// Numbers that are rounded at random: natural compression, or levels of QSGD.
struct RoundedChunk {
  CodedSource source;
  int64_t begin, length;  // begin: a multiple of kCodecChunk, or the whole is one chunk
  uint64_t seed;
  uint32_t step, tensor;
  float* out;                   // x - C(x), from the tensor's first element
  uint8_t* bytes;               // exponents, or packed numbers, likewise
  uint8_t* signs;               // of natural compression; null: levels are sent
  int levels;                   // above 0
  int64_t block;                // elements that share a unit
  const float *unit, *inverse;  // of the blocks
};

struct RoundedMessages {
  const uint8_t *first, *signs;  // of the first rank, from the tensor's first element
  int64_t stride;                // from rank to rank
  int ranks, width;              // bits per number
  int64_t block;
  const uint8_t* units;  // float32, as bytes
};

struct CodecInfo {
  double (*code)(const CodedChunk&);  // the sum of |x|
  // x -= scale * sign(x)
  void (*subtract)(float* x, int64_t n, float scale);
  // out = factor * (the sum of scale * sign over ranks); or its sign, where out is null
  void (*sum)(const SignMessages&, int64_t begin, int64_t length, float factor, float* out,
              uint8_t* signs);
  double (*squares)(const CodedSource&, int64_t begin, int64_t length);
  void (*rounded)(const RoundedChunk&);
  // The sum over ranks of what was rounded.
  void (*sum_rounded)(const RoundedMessages&, int64_t begin, int64_t length, float* out);
};

// ---- aggregate: the vectors of many clients, as a federated server sums them up
// ------------------

struct Clients {
  const void* const* data;  // contiguous vectors
  const double* weights;    // as many
  int64_t count;
  bool wide;  // doubles, not floats
};

// Of a block of at most 8192 elements; [floats, doubles].
struct AggregateInfo {
  // Writes the weighted sum, and returns the sum of squares of what was written.
  Partial (*sum[2])(const Clients&, int64_t begin, int64_t length, void* out);
  // The inner products with another vector, one for each client.
  void (*dot[2])(const Clients&, int64_t begin, int64_t length, const void* other, double* out);
};

struct KernelTable {
  const char* isa;
  const ReduceFn (*reduce)[kDTypes];  // [reduction][dtype]
  const RowsFn* reduce_rows;          // [dtype]
  const RuleInfo* rules;
  const SourceInfo* sources;  // in the order of rules
  int rule_count;
  const ProbeFn (*probe)[3];  // [streams read and written][streams read]
  CodecInfo codec;
  AggregateInfo aggregate;
};

namespace baseline {
KernelTable reduce_table();
KernelTable apply_table();
KernelTable source_table();
KernelTable probe_table();
KernelTable codec_table();
KernelTable aggregate_table();
}  // namespace baseline
namespace avx2 {
KernelTable reduce_table();
KernelTable apply_table();
KernelTable source_table();
KernelTable probe_table();
KernelTable codec_table();
KernelTable aggregate_table();
}  // namespace avx2
namespace avx512 {
KernelTable reduce_table();
KernelTable apply_table();
KernelTable source_table();
KernelTable probe_table();
KernelTable codec_table();
KernelTable aggregate_table();
}  // namespace avx512

}  // namespace pysmooth

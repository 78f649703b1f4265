// The interface between the kernels, compiled once per ISA level, and the code that runs them.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/layout.h"
#include "core/rule.h"

namespace pysmooth {

// ---- reduce ------------------------------------------------------------------------------------

// What is accumulated over the elements; p is the order of a power sum.
enum class Reduction : int { sum_squares, sum_abs, max_abs, min_abs, count_nonzero, sum_power };
constexpr int kReductions = 6;

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

// ---- apply -------------------------------------------------------------------------------------

struct ApplyArgs {
  void* param;
  const void* grad;
  void* state[kMaxStates];
  const Layout* layout;  // null: linear
  int64_t begin, length;
  const double* hyper;
  Scalars scalars;
};
using ApplyFn = void (*)(const ApplyArgs&);

constexpr int kMaxHyper = 16;

struct RuleInfo {
  const char* name;
  int states;
  bool reads_grad;
  bool counts_steps;
  void (*derive)(const double* hyper, double step, double* derived);
  int hypers;
  const char* hyper[kMaxHyper];
  ApplyFn apply[kDTypes][kDTypes];  // [parameter][gradient]; null where not instantiated
};

// ---- probe: bandwidth measurement
// ----------------------------------------------------------------

struct ProbeArgs {
  float* rw[3];
  const float* r[2];
  int64_t begin, length;
};
using ProbeFn = double (*)(const ProbeArgs&);

struct KernelTable {
  const char* isa;
  const ReduceFn (*reduce)[kDTypes];  // [reduction][dtype]
  const RuleInfo* rules;
  int rule_count;
  const ProbeFn (*probe)[3];  // [streams read and written][streams read]
};

namespace baseline {
KernelTable reduce_table();
KernelTable apply_table();
KernelTable probe_table();
}  // namespace baseline
namespace avx2 {
KernelTable reduce_table();
KernelTable apply_table();
KernelTable probe_table();
}  // namespace avx2
namespace avx512 {
KernelTable reduce_table();
KernelTable apply_table();
KernelTable probe_table();
}  // namespace avx512

}  // namespace pysmooth

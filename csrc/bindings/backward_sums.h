// Sums over one parameter's gradient, taken during backward.
//
// An instance is the parameter's post-accumulate-grad hook: torch calls it when the gradient is
// complete, and so still in cache. It keeps the partial results of the gradient's chunks, the same
// ones that reduce would find, until a step asks for them. By then the gradient may be another one,
// or have other values; what can be told of that is told here.
#pragma once

#include "bindings/tensor_reader.h"
#include "cpu/run.h"

namespace pysmooth {

enum class Kept : int {
  none,      // there are no sums of this gradient
  tampered,  // its values changed without a new version: others may have, too
  valid,
};

class BackwardSums {
 public:
  explicit BackwardSums(double norm_type) : norm_type_(norm_type) {}

  // The hook. A gradient that it cannot read, or not as one dense block, is left to the step, which
  // says what is wrong with it where something is.
  void take(const py::object& param);

  // What is known of `grad`, which is at `d`; where it is valid its partials go to `out`.
  Kept find(const py::object& grad, const DLTensor& d, Partial* out);

 private:
  // Values of a chunk, to notice writes that torch keeps no count of (through .data or numpy, or by
  // GradScaler.unscale_): its first cache line that is not all zeros, so that scaling shows.
  struct Mark {
    int64_t line = 0;
    uint64_t hash = 0;
  };
  struct Line {
    uint64_t hash;
    bool zeros;
  };
  Mark mark_of(const Chunk& chunk) const;
  Line read_line(const Chunk& chunk, int64_t line) const;
  void sum_up(int64_t from, int64_t to);

  double norm_type_;
  bool valid_ = false;
  AttributeGetter grad_of_{"grad"}, version_of_{"_version"};
  py::object grad_;  // weak: zero_grad() must free the gradient's memory
  int64_t version_ = 0;
  Signature form_;
  int64_t itemsize_ = 0;
  DType dtype_ = DType::f32;
  ChunkTable chunks_;
  std::vector<Partial> partials_;
  std::vector<Mark> marks_;
};

void bind_backward_sums(py::module_& m);

}  // namespace pysmooth

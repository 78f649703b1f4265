// What a step is told, the same for every backend.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/config.h"
#include "core/dtype.h"

namespace pysmooth {

// What is accumulated over the elements; p is the order of a power sum.
enum class Reduction : int { sum_squares, sum_abs, max_abs, min_abs, count_nonzero, sum_power };
constexpr int kReductions = 6;

// What a norm of this order is made of.
inline Reduction reduction_of(double norm_type) {
  if (norm_type == 2.0) return Reduction::sum_squares;
  if (norm_type == 1.0) return Reduction::sum_abs;
  if (norm_type == 0.0) return Reduction::count_nonzero;
  if (std::isinf(norm_type)) return norm_type > 0 ? Reduction::max_abs : Reduction::min_abs;
  return Reduction::sum_power;
}

// Over which gradients a clip norm is taken; block: SelectSpec::block consecutive elements, in
// passes before apply alone.
enum class Scope : int { global = 0, group = 1, tensor = 2, block = 3 };

// What to do about a gradient that holds an infinity or a NaN.
enum class NonFinite : int { propagate = 0, skip = 1, raise = 2, zero = 3 };

// Whether a step has to know first if all gradients are finite.
inline bool asks_first(NonFinite policy) {
  return policy == NonFinite::skip || policy == NonFinite::raise;
}

// The type that a rule computes in: double for double parameters, else float.
enum Compute : int { kFloat = 0, kDouble = 1 };
constexpr int kComputes = 2;
constexpr Compute compute_of(DType param) { return param == DType::f64 ? kDouble : kFloat; }

constexpr int kMaxHyper = 16;

enum class Selector : int { none = 0, top_k = 1, rand_k = 2 };
enum class SelectScope : int { tensor = 0, global = 1, block = 2 };

struct SelectSpec {
  Selector kind = Selector::none;
  SelectScope scope = SelectScope::tensor;
  double ratio = 0.0;  // of the unit's elements, rounded up; 0: k counts
  int64_t k = 0;
  int64_t block = 1024;  // a divisor of kChunk; also where sums are taken per block
  bool scaled = false;   // rand_k: times d / k
  uint64_t seed = 0;

  // Of so many elements.
  PYSMOOTH_HD int64_t chosen_of(int64_t elements) const {
    if (elements == 0) return 0;
    const double wanted = std::ceil(ratio * static_cast<double>(elements));
    const int64_t count = ratio > 0.0 ? static_cast<int64_t>(wanted) : k;
    return count < 1 ? 1 : count < elements ? count : elements;
  }
  // What the chosen ones are multiplied by.
  PYSMOOTH_HD double scale_of(int64_t elements) const {
    if (kind != Selector::rand_k || !scaled) return 1.0;
    return static_cast<double>(elements) / static_cast<double>(chosen_of(elements));
  }
};

}  // namespace pysmooth

// How several tensors of one shape lie in memory, relative to each other.
//
// A step walks parameter, gradient and states element by element. Where all of them are dense and
// share their strides (in any dimension order) that walk is linear in memory, and no Layout is
// needed. Otherwise a Layout describes it: dimensions of size 1 dropped, the rest sorted by the
// first operand's strides and merged wherever all operands allow it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace pysmooth {

constexpr int kMaxDims = 16;
constexpr int kMaxStates = 4;
constexpr int kMaxOperands = 2 + kMaxStates;  // parameter, gradient, states

struct Layout {
  int ndim = 0;
  int operands = 0;
  int64_t size[kMaxDims] = {};                  // outermost first
  int64_t stride[kMaxOperands][kMaxDims] = {};  // in elements

  // True if walking every operand from its base in memory order visits the elements in step.
  bool linear() const {
    if (ndim == 0) return true;
    if (ndim > 1) return false;
    for (int k = 0; k < operands; ++k)
      if (stride[k][0] != 1) return false;
    return true;
  }
};

// The order in which dimensions are walked, outermost first; those of size 1 are left out.
// `rows_first`: the first dimension is the outermost, wherever it lies.
inline std::vector<int> walk_order(int ndim, const int64_t* shape,
                                   const std::vector<const int64_t*>& strides,
                                   bool rows_first = false) {
  const int operands = static_cast<int>(strides.size());
  std::vector<int> order;
  for (int d = 0; d < ndim; ++d)
    if (shape[d] != 1) order.push_back(d);
  const auto magnitude = [&](int k, int d) {
    return strides[k][d] < 0 ? -strides[k][d] : strides[k][d];
  };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    if (rows_first && (a == 0 || b == 0)) return a == 0 && b != 0;
    for (int k = 0; k < operands; ++k)
      if (magnitude(k, a) != magnitude(k, b)) return magnitude(k, a) > magnitude(k, b);
    return false;
  });
  return order;
}

// Builds the merged layout of `operands` tensors of one shape. False if it needs too many
// dimensions to be held.
inline bool merge_layout(int ndim, const int64_t* shape, const std::vector<const int64_t*>& strides,
                         Layout* out, bool rows_first = false) {
  const int operands = static_cast<int>(strides.size());
  *out = Layout{};
  out->operands = operands;
  for (const int d : walk_order(ndim, shape, strides, rows_first)) {
    const int last = out->ndim - 1;
    bool merges = last >= 0;
    for (int k = 0; merges && k < operands; ++k)
      merges = out->stride[k][last] == strides[k][d] * shape[d];
    if (!merges && out->ndim == kMaxDims) return false;
    const int at = merges ? last : out->ndim++;
    out->size[at] = merges ? out->size[at] * shape[d] : shape[d];
    for (int k = 0; k < operands; ++k) out->stride[k][at] = strides[k][d];
  }
  return true;
}

// True if two different elements of the tensor share memory (an expanded tensor, say). Sufficient
// for "no": sorted by stride, each dimension steps over everything that the smaller ones span.
inline bool overlaps_itself(int ndim, const int64_t* shape, const int64_t* strides) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // (|stride|, size)
  for (int d = 0; d < ndim; ++d) {
    if (shape[d] == 0) return false;
    if (shape[d] != 1) dims.emplace_back(strides[d] < 0 ? -strides[d] : strides[d], shape[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t span = 0;  // of the dimensions seen so far, in elements, less one
  for (const auto& [stride, size] : dims) {
    if (stride <= span) return true;
    span += stride * (size - 1);
  }
  return false;
}

}  // namespace pysmooth

// Finds tensors of a list that share memory. Kernels write all of them at once, from several
// threads, so a shared element would be updated twice, or torn.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "bindings/tensor_reader.h"

namespace pysmooth {

struct Region {
  uintptr_t begin = 0, end = 0;  // bytes spanned; empty tensors have none
  int itemsize = 0;
  int64_t numel = 0;
  const RealView* view = nullptr;  // null: one dense block, in any order
  int index = 0;                   // into the caller's list

  static Region of(const void* data, const RealView& view, int index);
  static Region dense(const void* data, int64_t numel, int itemsize, int index);
};

// A pair of indices that share memory, or {-1, -1}. Interleaved views of one storage (x[..., 0] and
// x[..., 1]) do not share any.
std::pair<int, int> find_alias(std::vector<Region> regions);

// A gradient that is to be scaled in place.
struct Scaled {
  const void* data;
  int64_t numel;
  DType dtype;
  bool dense;  // one block, without gaps
};

// In-place scaling would hit an element of an expanded gradient more than once, and memory that two
// gradients share twice over, at the same time: raises ValueError. scaled(t) is gradient t;
// view(t), a RealView, is asked for where it is not dense.
template <class Of, class View>
void check_scalable(size_t count, Of scaled, View view) {
  const auto bytes = [](const Scaled& x) {
    return static_cast<uintptr_t>(x.numel) * static_cast<uintptr_t>(itemsize(x.dtype));
  };
  // The usual case, found out quickly: every gradient is one dense block, and no two of them meet.
  std::vector<std::pair<uintptr_t, uintptr_t>> spans;
  spans.reserve(count);
  bool apart = true;
  for (size_t t = 0; apart && t < count; ++t) {
    const Scaled x = scaled(t);
    const auto begin = reinterpret_cast<uintptr_t>(x.data);
    spans.emplace_back(begin, begin + bytes(x));
    apart = x.dense;
  }
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; apart && i < spans.size(); ++i) apart = spans[i].first >= spans[i - 1].second;
  if (apart) return;
  std::vector<Region> regions;
  std::deque<RealView> views;
  for (size_t t = 0; t < count; ++t) {
    const Scaled x = scaled(t);
    if (x.dense) {
      regions.push_back(Region::dense(x.data, x.numel, itemsize(x.dtype), static_cast<int>(t)));
      continue;
    }
    const RealView& v = views.emplace_back(view(t));
    if (overlaps_itself(static_cast<int>(v.shape.size()), v.shape.data(), v.strides.data()))
      throw py::value_error("gradient " + std::to_string(t) +
                            " overlaps itself in memory (an expanded tensor?) and cannot be "
                            "scaled in place; clone it first");
    regions.push_back(Region::of(x.data, v, static_cast<int>(t)));
  }
  const auto [a, b] = find_alias(std::move(regions));
  if (a >= 0)
    throw py::value_error("gradients " + std::to_string(a) + " and " + std::to_string(b) +
                          " share memory and cannot be scaled in place");
}

}  // namespace pysmooth

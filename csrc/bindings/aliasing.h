// Finds tensors of a list that share memory. Kernels write all of them at once, from several
// threads, so a shared element would be updated twice, or torn.
#pragma once

#include <cstdint>
#include <vector>

#include "bindings/tensor_reader.h"

namespace pysmooth {

struct Region {
  uintptr_t begin = 0, end = 0;  // bytes spanned; empty tensors have none
  int itemsize = 0;
  int64_t numel = 0;
  const RealView* view = nullptr;  // null: one dense block, in any order
  int index = 0;                   // into the caller's list

  static Region of(void* data, const RealView& view, int index);
  static Region dense(const void* data, int64_t numel, int itemsize, int index);
};

// A pair of indices that share memory, or {-1, -1}. Interleaved views of one storage (x[..., 0] and
// x[..., 1]) do not share any.
std::pair<int, int> find_alias(std::vector<Region> regions);

}  // namespace pysmooth

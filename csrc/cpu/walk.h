// Walks the elements [begin, begin + length) of a strided Layout, one innermost run at a time.
#pragma once

#include "core/config.h"
#include "core/layout.h"

PYSMOOTH_KERNELS_BEGIN

// Calls run(offset, count): offset[k] is where operand k's run starts, in elements; along the run
// operand k advances by layout.stride[k][layout.ndim - 1].
template <class Run>
PYSMOOTH_HD void walk(const Layout& layout, int64_t begin, int64_t length, Run run) {
  const int inner = layout.ndim - 1;
  int64_t index[kMaxDims];
  int64_t offset[kMaxOperands] = {};
  int64_t rest = begin;
  for (int d = inner; d >= 0; --d) {
    index[d] = rest % layout.size[d];
    rest /= layout.size[d];
    for (int k = 0; k < layout.operands; ++k) offset[k] += index[d] * layout.stride[k][d];
  }
  while (length > 0) {
    const int64_t left = layout.size[inner] - index[inner];
    const int64_t count = left < length ? left : length;
    run(offset, count);
    length -= count;
    index[inner] += count;
    for (int k = 0; k < layout.operands; ++k) offset[k] += count * layout.stride[k][inner];
    for (int d = inner; d > 0 && index[d] == layout.size[d]; --d) {
      index[d] = 0;
      ++index[d - 1];
      for (int k = 0; k < layout.operands; ++k)
        offset[k] += layout.stride[k][d - 1] - layout.size[d] * layout.stride[k][d];
    }
  }
}

PYSMOOTH_KERNELS_END

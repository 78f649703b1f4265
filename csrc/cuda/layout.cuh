// Where the elements of strided operands are.
#pragma once

#include "cuda/device.cuh"

PYSMOOTH_KERNELS_BEGIN

// In elements, of the i-th one of a walk over the layout; of the first kOperands operands.
template <int kOperands>
PYSMOOTH_DEVICE void offsets_of(const Layout& layout, int64_t i, int64_t (&out)[kOperands]) {
  PYSMOOTH_UNROLL
  for (int k = 0; k < kOperands; ++k) out[k] = 0;
  PYSMOOTH_ROLLED
  for (int d = layout.ndim - 1; d >= 0; --d) {
    const int64_t size = layout.size[d];
    const int64_t step = i % size;
    i /= size;
    PYSMOOTH_UNROLL
    for (int k = 0; k < kOperands; ++k) out[k] += step * layout.stride[k][d];
  }
}

PYSMOOTH_KERNELS_END

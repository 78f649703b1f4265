// put, on CUDA: numbers of the host, carried in a launch's parameters, go to device memory. Neither
// pinned memory nor a copy is involved, and a captured graph replays it with the numbers it has.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernels.h"

PYSMOOTH_KERNELS_BEGIN

template <int kWords>
PYSMOOTH_KERNEL put(uint64_t* at, int words, cuda::Payload<kWords> payload) {
  for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) at[i] = payload.word[i];
}

PYSMOOTH_KERNELS_END

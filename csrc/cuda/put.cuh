// put, on CUDA: numbers of the host, carried in a launch's parameters, go to device memory. Neither
// pinned memory nor a copy is involved, and a captured graph replays it with the numbers it has.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernels.h"

PYSMOOTH_KERNELS_BEGIN

// A whole block.
template <int kWords>
PYSMOOTH_DEVICE void put_words(uint64_t* at, int words, const cuda::Payload<kWords>& payload) {
  for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) at[i] = payload.word[i];
}

template <int kWords>
PYSMOOTH_KERNEL put(uint64_t* at, int words, cuda::Payload<kWords> payload) {
  put_words(at, words, payload);
}

PYSMOOTH_KERNELS_END

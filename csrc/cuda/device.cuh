// What kernels use of CUDA. Without nvcc the emulation stands in (tests/simt/simt.h).
#pragma once

#include "core/half.h"
#include "core/rules.h"
#include "core/streams.h"
#include "cuda/plan.h"

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_runtime.h>
// A shared variable of a type that needs no construction.
#define PYSMOOTH_SHARED(Type, name) __shared__ Type name
#define PYSMOOTH_UNROLL _Pragma("unroll")
#define PYSMOOTH_ROLLED _Pragma("unroll 1")
// A parameter of a kernel that stays where it was put, though functions are told its address.
#define PYSMOOTH_IN_PLACE __grid_constant__
// All blocks of the launch meet.
#define PYSMOOTH_SYNC_GRID() cooperative_groups::this_grid().sync()
#else
#include "simt.h"
#define PYSMOOTH_SHARED(Type, name) \
  static char name##_key;           \
  Type& name = *static_cast<Type*>(simt::shared(&name##_key, sizeof(Type)))
#define PYSMOOTH_UNROLL
#define PYSMOOTH_ROLLED
#define PYSMOOTH_IN_PLACE
#define PYSMOOTH_SYNC_GRID() simt::sync_grid(__LINE__)
#endif

#define PYSMOOTH_DEVICE __device__ __forceinline__
#define PYSMOOTH_APART __device__ __attribute__((noinline))
#define PYSMOOTH_KERNEL __global__ void __launch_bounds__(pysmooth::cuda::kThreads, 1)

PYSMOOTH_KERNELS_BEGIN

using cuda::Entry;
using cuda::GroupInput;
using cuda::Item;
using cuda::kFoldElements;
using cuda::kPassElements;
using cuda::kRow;
using cuda::kThreads;
using cuda::kWarp;
using cuda::kWarps;
using cuda::Prepared;
using cuda::RowCut;
using cuda::Shared;
using cuda::StepInput;
using cuda::View;
using cuda::Work;

constexpr uint32_t kEveryLane = 0xffffffffu;

PYSMOOTH_DEVICE int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
PYSMOOTH_DEVICE int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }
// Of all warps of the launch.
PYSMOOTH_DEVICE int64_t warp_number() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + warp_id();
}

// Item `i` of a launch; its tensor is -1 where there is nothing to do.
PYSMOOTH_DEVICE Item item_at(const View& plan, const Work& work, int64_t i) {
  Item out{-1, 0};
  if (i < work.count) out = work.items[i];
  if (out.tensor >= 0 && plan.grads[out.tensor] == nullptr) out.tensor = -1;
  return out;
}
// The warp's, where there is one each.
PYSMOOTH_DEVICE Item item_of(const View& plan, const Work& work) {
  return item_at(plan, work, warp_number());
}

// ---- 16-bit formats: by instruction where there is one; tests compare bits with all NaN alike
// -----

PYSMOOTH_DEVICE float from_f16(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(static_cast<uint16_t>(bits)));
  return out;
#else
  return widen_f16<float>(bits);
#endif
}

PYSMOOTH_DEVICE uint32_t to_f16(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(x));
  return out;
#else
  return narrow_f16<uint32_t>(x);
#endif
}

PYSMOOTH_DEVICE uint32_t to_bf16(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(x));
  return out;
#else
  return narrow_bf16<uint32_t>(x);
#endif
}

// A number as it is stored, low bits first, and back.
PYSMOOTH_DEVICE float decode16(uint32_t bits, DType dtype) {
  return dtype == DType::bf16 ? widen_bf16<float>(bits) : from_f16(bits);
}

template <class C>
PYSMOOTH_DEVICE C load_as(const void* at, DType dtype) {
  if (dtype == DType::f32) return static_cast<C>(*static_cast<const float*>(at));
  if constexpr (sizeof(C) == 8) return *static_cast<const double*>(at);
  return static_cast<C>(decode16(*static_cast<const uint16_t*>(at), dtype));
}

PYSMOOTH_DEVICE uint32_t encode16(float x, DType dtype) {
  return dtype == DType::bf16 ? to_bf16(x) : to_f16(x);
}

template <class C>
PYSMOOTH_DEVICE void store_as(void* at, DType dtype, C x) {
  if constexpr (sizeof(C) == 8)
    *static_cast<double*>(at) = x;
  else if (dtype == DType::f32)
    *static_cast<float*>(at) = x;
  else
    *static_cast<uint16_t*>(at) = static_cast<uint16_t>(encode16(x, dtype));
}

// ---- arriving
// --------------------------------------------------------------------------------------

// True in the warp that is the last of `expected` to come, every one with its results written. The
// counter is 0 again afterwards.
PYSMOOTH_DEVICE bool last_warp(uint32_t* arrived, uint32_t expected) {
  __syncwarp();
  int last = 0;
  if (lane_id() == 0) {
    __threadfence();
    last = atomicInc(arrived, expected - 1) == expected - 1 ? 1 : 0;
    __threadfence();
  }
  return __shfl_sync(kEveryLane, last, 0) != 0;
}

// The same for blocks.
PYSMOOTH_DEVICE bool last_block(uint32_t* arrived, uint32_t expected) {
  PYSMOOTH_SHARED(int, last);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(arrived, expected - 1) == expected - 1 ? 1 : 0;
    __threadfence();
  }
  __syncthreads();
  return last != 0;
}

PYSMOOTH_KERNELS_END

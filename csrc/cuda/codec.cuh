// Messages of signs: a ballot is 32 of them. The CPU kernels' bytes and bits (cpu/codec.cpp).
//
// |x| is summed up as there: 64 lanes over runs of 8,192 elements in float, what they come to in
// double, in the order of lanes, runs and chunks.
#pragma once

#include "cuda/codec.h"
#include "cuda/fold.cuh"

PYSMOOTH_KERNELS_BEGIN

using cuda::CodedSource;
using cuda::Coding;
using cuda::kOctet;

constexpr int kChunkRuns = 4;  // kCodecChunk of cpu/codec.h

PYSMOOTH_DEVICE float value_at(const CodedSource& s, int64_t i) {
  const float x = s.a * s.g[i];
  return s.e == nullptr ? x : s.b * s.e[i] + x;
}

// The thread's number, in launches where each takes an octet.
PYSMOOTH_DEVICE int64_t octet_number() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int64_t>(threadIdx.x);
}

PYSMOOTH_DEVICE bool takes_words(const float* at) {
  return (reinterpret_cast<uintptr_t>(at) & 15u) == 0;
}

// x[j] = from[first + j], 0 beyond n.
PYSMOOTH_DEVICE void take_octet(const float* from, int64_t first, int64_t n, float* x) {
  if (first + kOctet <= n && takes_words(from)) {
    PYSMOOTH_UNROLL
    for (int half = 0; half < 2; ++half) {
      const uint4 w = reinterpret_cast<const uint4*>(from + first)[half];
      const uint32_t words[] = {w.x, w.y, w.z, w.w};
      PYSMOOTH_UNROLL
      for (int j = 0; j < 4; ++j) x[4 * half + j] = bits_as<float>(words[j]);
    }
    return;
  }
  PYSMOOTH_UNROLL
  for (int j = 0; j < kOctet; ++j) x[j] = first + j < n ? from[first + j] : 0.0f;
}

PYSMOOTH_DEVICE void give_octet(float* to, int64_t first, int64_t n, const float* x) {
  if (first + kOctet <= n && takes_words(to)) {
    PYSMOOTH_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4];
      PYSMOOTH_UNROLL
      for (int j = 0; j < 4; ++j) words[j] = bits_as<uint32_t>(x[4 * half + j]);
      reinterpret_cast<uint4*>(to + first)[half] = {words[0], words[1], words[2], words[3]};
    }
    return;
  }
  PYSMOOTH_UNROLL
  for (int j = 0; j < kOctet; ++j)
    if (first + j < n) to[first + j] = x[j];
}

// A run per warp. Rows are of 64 elements, of which a lane has those `lane` and `lane` + 32.
PYSMOOTH_KERNEL code_signs(Coding c) {
  constexpr int kTurns = 4;  // rows under way at once
  const int64_t run = warp_number(), begin = run * kFoldElements;
  const int lane = lane_id();
  if (begin >= c.n) return;
  float sum[2] = {};
  for (int64_t first = begin; first < begin + kFoldElements && first < c.n;
       first += kTurns * kRow) {
    float x[kTurns][2];
    PYSMOOTH_UNROLL
    for (int u = 0; u < kTurns; ++u) PYSMOOTH_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t i = first + u * kRow + half * kWarp + lane;
      x[u][half] = i < c.n ? value_at(c.source, i) : 0.0f;
    }
    PYSMOOTH_UNROLL
    for (int u = 0; u < kTurns; ++u) {
      const int64_t row = first + u * kRow;
      uint32_t words[2];
      PYSMOOTH_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int64_t i = row + half * kWarp + lane;
        const float v = x[u][half];
        sum[half] += absolute(v);
        words[half] = __ballot_sync(kEveryLane, i < c.n && v >= 0.0f);
        if (c.out != nullptr && i < c.n) c.out[i] = v;
      }
      const int byte = lane % 4;
      if (c.message != nullptr && lane < kRow / 8 && row + 8 * lane < c.n)
        c.message[row / 8 + lane] = static_cast<uint8_t>(words[lane < 4 ? 0 : 1] >> 8 * byte);
    }
  }
  double total = 0.0;
  PYSMOOTH_ROLLED
  for (int place = 0; place < kRow; ++place)
    total +=
        static_cast<double>(__shfl_sync(kEveryLane, sum[place < kWarp ? 0 : 1], place % kWarp));
  if (lane == 0) c.sums[run] = total;
}

// What runs have come to: chunk by chunk. One warp.
PYSMOOTH_KERNEL add_up(Coding c) {
  if (warp_id() != 0) return;
  const int64_t runs = (c.n + kFoldElements - 1) / kFoldElements;
  const int64_t chunks = (runs + kChunkRuns - 1) / kChunkRuns;
  double total = 0.0;
  for (int64_t first = 0; first < chunks; first += kWarp) {
    double mine = 0.0;
    for (int r = 0; r < kChunkRuns; ++r) {
      const int64_t run = (first + lane_id()) * kChunkRuns + r;
      if (run < runs) mine += c.sums[run];
    }
    for (int lane = 0; lane < kWarp && first + lane < chunks; ++lane)
      total += __shfl_sync(kEveryLane, mine, lane);
  }
  if (lane_id() == 0) c.sums[runs] = total;
}

PYSMOOTH_KERNEL subtract_signs(Coding c) {
  const int64_t first = kOctet * octet_number();
  if (first >= c.n) return;
  const float scale = *c.scales;
  float x[kOctet];
  take_octet(c.out, first, c.n, x);
  PYSMOOTH_UNROLL
  for (int j = 0; j < kOctet; ++j) x[j] = x[j] - (x[j] >= 0.0f ? scale : -scale);
  give_octet(c.out, first, c.n, x);
}

// The sum over ranks of scale * sign, of the thread's octet.
PYSMOOTH_DEVICE void sum_of_signs(const Coding& c, int64_t octet, float* sum) {
  PYSMOOTH_UNROLL
  for (int j = 0; j < kOctet; ++j) sum[j] = 0.0f;
  for (int r = 0; r < c.ranks; ++r) {
    const uint32_t bits = c.messages[r * c.stride + octet];
    const float scale = c.scales == nullptr ? 1.0f : c.scales[r];
    PYSMOOTH_UNROLL
    for (int j = 0; j < kOctet; ++j) sum[j] += (bits >> j & 1u) != 0 ? scale : -scale;
  }
}

PYSMOOTH_KERNEL sum_signs(Coding c) {
  const int64_t octet = octet_number();
  if (kOctet * octet >= c.n) return;
  float sum[kOctet];
  sum_of_signs(c, octet, sum);
  PYSMOOTH_UNROLL
  for (int j = 0; j < kOctet; ++j) sum[j] = sum[j] * c.factor;
  give_octet(c.out, kOctet * octet, c.n, sum);
}

PYSMOOTH_KERNEL vote(Coding c) {
  const int64_t octet = octet_number();
  if (kOctet * octet >= c.n) return;
  float sum[kOctet];
  sum_of_signs(c, octet, sum);
  uint32_t bits = 0;
  PYSMOOTH_UNROLL
  for (int j = 0; j < kOctet; ++j)
    if (kOctet * octet + j < c.n && sum[j] >= 0.0f) bits |= 1u << j;
  c.message[octet] = static_cast<uint8_t>(bits);
}

PYSMOOTH_KERNELS_END

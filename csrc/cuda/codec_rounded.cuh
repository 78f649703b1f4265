// Messages of numbers that are rounded at random: the CPU kernels' bytes (cpu/codec.cpp). A thread
// has eight elements, whose signs are a byte, and whose levels a whole number of bytes.
#pragma once

#include "core/compress.h"
#include "core/random.h"
#include "cuda/codec.cuh"

PYSMOOTH_KERNELS_BEGIN

constexpr int64_t kSummedElements = int64_t{kChunkRuns} * kFoldElements;  // kCodecChunk

// Numbers of a few bits, one after another.
struct BitWriter {
  uint8_t* to;
  uint64_t pending = 0;
  int held = 0;

  PYSMOOTH_DEVICE void put(uint64_t number, int width) {
    pending |= number << held;
    for (held += width; held >= 8; held -= 8, pending >>= 8) *to++ = static_cast<uint8_t>(pending);
  }
  PYSMOOTH_DEVICE void flush() {
    if (held > 0) *to = static_cast<uint8_t>(pending);
  }
};

struct BitReader {
  const uint8_t* from;
  uint64_t pending = 0;
  int held = 0;

  PYSMOOTH_DEVICE uint64_t take(int width) {
    for (; held < width; held += 8) pending |= uint64_t{*from++} << held;
    const uint64_t number = pending & ((uint64_t{1} << width) - 1u);
    pending >>= width;
    held -= width;
    return number;
  }
};

PYSMOOTH_DEVICE float float_at(const uint8_t* at) {
  uint32_t bits = 0;
  PYSMOOTH_UNROLL
  for (int i = 0; i < 4; ++i) bits |= uint32_t{at[i]} << 8 * i;
  return bits_as<float>(bits);
}

PYSMOOTH_DEVICE void put_float(uint8_t* to, float x) {
  const auto bits = bits_as<uint32_t>(x);
  PYSMOOTH_UNROLL
  for (int i = 0; i < 4; ++i) to[i] = static_cast<uint8_t>(bits >> 8 * i);
}

// Elements of an octet that are there.
PYSMOOTH_DEVICE int live_of(const Coding& c, int64_t octet) {
  const int64_t left = c.n - kOctet * octet;
  return left < kOctet ? static_cast<int>(left) : kOctet;
}

// What is sent, of an octet.
PYSMOOTH_DEVICE void evaluate(const Coding& c, int64_t octet, float* x) {
  take_octet(c.source.g, kOctet * octet, c.n, x);
  PYSMOOTH_UNROLL
  for (int j = 0; j < kOctet; ++j) x[j] = c.source.a * x[j];
  if (c.source.e == nullptr) return;
  float e[kOctet];
  take_octet(c.source.e, kOctet * octet, c.n, e);
  PYSMOOTH_UNROLL
  for (int j = 0; j < kOctet; ++j) x[j] = c.source.b * e[j] + x[j];
}

// Random bits for an octet: two blocks of four words.
PYSMOOTH_DEVICE void draw_octet(const Coding& c, int64_t octet, float* drawn) {
  PYSMOOTH_UNROLL
  for (int half = 0; half < 2; ++half) {
    const auto block = static_cast<uint64_t>(2 * octet + half);
    const Words words = philox(
        Words{{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), c.step, c.tensor}},
        static_cast<uint32_t>(c.seed), static_cast<uint32_t>(c.seed >> 32));
    PYSMOOTH_UNROLL
    for (int j = 0; j < 4; ++j) drawn[4 * half + j] = bits_as<float>(words.word[j]);
  }
}

// What an octet's sum over ranks becomes.
PYSMOOTH_DEVICE void give_sum(const Coding& c, int64_t octet, float* sum) {
  PYSMOOTH_UNROLL
  for (int j = 0; j < kOctet; ++j) sum[j] = sum[j] * c.factor;
  if (c.base != nullptr) {
    float base[kOctet];
    take_octet(c.base, kOctet * octet, c.n, base);
    PYSMOOTH_UNROLL
    for (int j = 0; j < kOctet; ++j) sum[j] = sum[j] + base[j];
  }
  give_octet(c.out, kOctet * octet, c.n, sum);
}

// ---- natural compression

PYSMOOTH_KERNEL code_natural(Coding c) {
  const int64_t octet = octet_number(), first = kOctet * octet;
  if (first >= c.n) return;
  float x[kOctet], drawn[kOctet];
  evaluate(c, octet, x);
  draw_octet(c, octet, drawn);
  uint32_t signs = 0;
  PYSMOOTH_UNROLL
  for (int j = 0; j < kOctet; ++j)
    if (first + j < c.n) {
      const float sent = natural<float, float>(x[j], drawn[j]);
      const auto bits = bits_as<uint32_t>(sent);
      c.message[first + j] = static_cast<uint8_t>(bits >> 23);
      signs |= bits >> 31 << j;
      x[j] = x[j] - sent;
    }
  c.message[c.n + octet] = static_cast<uint8_t>(signs);
  give_octet(c.out, first, c.n, x);
}

PYSMOOTH_KERNEL sum_natural(Coding c) {
  const int64_t octet = octet_number(), first = kOctet * octet;
  if (first >= c.n) return;
  const int live = live_of(c, octet);
  float sum[kOctet] = {};
  for (int r = 0; r < c.ranks; ++r) {
    const uint8_t* const row = c.messages + r * c.stride;
    const uint32_t signs = row[c.n + octet];
    PYSMOOTH_UNROLL
    for (int j = 0; j < kOctet; ++j)
      if (j < live)
        sum[j] += bits_as<float>(uint32_t{row[first + j]} << 23 | (signs >> j & 1u) << 31);
  }
  give_sum(c, octet, sum);
}

// ---- QSGD

PYSMOOTH_DEVICE int width_of(const Coding& c) {
  return 33 - __clz(static_cast<uint32_t>(c.levels));
}
PYSMOOTH_DEVICE int64_t blocks_of(const Coding& c) { return (c.n + c.block - 1) / c.block; }
PYSMOOTH_DEVICE int64_t pieces_of(const Coding& c) {
  return (c.block + kSummedElements - 1) / kSummedElements;
}

// What a block is multiplied by, and divided by, of its sum of squares.
PYSMOOTH_DEVICE void put_unit(const Coding& c, int64_t block, double total) {
  const double h[] = {static_cast<double>(CompressorKind::qsgd), static_cast<double>(c.levels)};
  const Compressor<float> compressor(h, std::sqrt(total));
  c.units[block] = compressor.scale;
  c.units[blocks_of(c) + block] = compressor.inverse;
  put_float(c.message + 4 * block, compressor.scale);
}

// A chunk of a block to eight threads, a lane each, as on the CPU; then lanes in pairs.
PYSMOOTH_KERNEL sum_squares(Coding c) {
  const int64_t pieces = pieces_of(c), piece = octet_number() / kOctet;
  const int lane = static_cast<int>(threadIdx.x) % kOctet;
  const int64_t block = piece / pieces;
  const int64_t begin = block * c.block + piece % pieces * kSummedElements;
  const int64_t last = block * c.block + c.block < c.n ? block * c.block + c.block : c.n;
  const int64_t end = begin + kSummedElements < last ? begin + kSummedElements : last;
  double sum = 0.0;
  for (int64_t i = begin + lane; i < end; i += kOctet) {
    const auto v = static_cast<double>(value_at(c.source, i));
    sum += v * v;
  }
  for (int by = kOctet / 2; by > 0; by /= 2) sum += __shfl_xor_sync(kEveryLane, sum, by);
  if (lane != 0 || block >= blocks_of(c)) return;
  if (pieces == 1)
    put_unit(c, block, sum);
  else
    c.sums[piece] = sum;
}

// A thread per block, where these have several chunks.
PYSMOOTH_KERNEL add_units(Coding c) {
  const int64_t block = octet_number(), pieces = pieces_of(c);
  if (block >= blocks_of(c)) return;
  double total = 0.0;
  for (int64_t i = 0; i < pieces; ++i) total += c.sums[block * pieces + i];
  put_unit(c, block, total);
}

PYSMOOTH_KERNEL code_levels(Coding c) {
  const int64_t octet = octet_number(), first = kOctet * octet;
  if (first >= c.n) return;
  const int width = width_of(c), live = live_of(c, octet);
  const int64_t blocks = blocks_of(c);
  const uint64_t most = (uint64_t{1} << width) - 1u;
  const auto levels = static_cast<float>(c.levels);
  float x[kOctet], drawn[kOctet];
  evaluate(c, octet, x);
  draw_octet(c, octet, drawn);
  BitWriter writer{c.message + 4 * blocks + octet * width};
  PYSMOOTH_UNROLL
  for (int j = 0; j < kOctet; ++j)
    if (j < live) {
      const int64_t block = (first + j) / c.block;
      const float steps =
          dithered_steps<float, float>(x[j], drawn[j], c.units[blocks + block], levels);
      const float size = steps * c.units[block], sent = x[j] < 0.0f ? -size : size;
      const auto k = static_cast<uint64_t>(static_cast<int64_t>(steps));
      writer.put((k << 1 | static_cast<uint64_t>(sent < 0.0f)) & most, width);
      x[j] = x[j] - sent;
    }
  writer.flush();
  give_octet(c.out, first, c.n, x);
}

PYSMOOTH_KERNEL sum_levels(Coding c) {
  const int64_t octet = octet_number(), first = kOctet * octet;
  if (first >= c.n) return;
  const int width = width_of(c), live = live_of(c, octet);
  float sum[kOctet] = {};
  for (int r = 0; r < c.ranks; ++r) {
    const uint8_t* const row = c.messages + r * c.stride;
    BitReader reader{row + 4 * blocks_of(c) + octet * width};
    int64_t held = -1;
    float unit = 0.0f;
    PYSMOOTH_UNROLL
    for (int j = 0; j < kOctet; ++j)
      if (j < live) {
        const int64_t block = (first + j) / c.block;
        if (block != held) unit = float_at(row + 4 * block);
        held = block;
        const uint64_t number = reader.take(width);
        const float size = static_cast<float>(static_cast<int64_t>(number >> 1)) * unit;
        sum[j] += (number & 1u) != 0 ? -size : size;
      }
  }
  give_sum(c, octet, sum);
}

PYSMOOTH_KERNELS_END

#include "cpu/codec.h"

#include <cstring>

#include "cpu/fold.h"
#include "cpu/port.h"
#include "cpu/sieve.h"

PYSMOOTH_KERNELS_BEGIN

namespace {

constexpr int kGroup = 64;  // elements that share a word of signs
constexpr int kW = lanes_of<float>;
constexpr int kVectors = kGroup / kW;
using io = vector_io<float>;

// The words of an unfinished group: beyond n elements there is nothing.
PYSMOOTH_HD void store_word(uint8_t* to, uint64_t word, int64_t n) {
  if (n < kGroup) word &= (uint64_t{1} << n) - 1u;
  std::memcpy(to, &word, n < kGroup ? static_cast<size_t>((n + 7) / 8) : sizeof(word));
}

PYSMOOTH_HD uint64_t load_word(const uint8_t* from, int64_t n) {
  uint64_t word = 0;
  std::memcpy(&word, from, n < kGroup ? static_cast<size_t>((n + 7) / 8) : sizeof(word));
  return word;
}

// A lane for every place in a group; in double after every block, so that sums of all widths agree.
struct Lanes {
  vec<float> lane[kVectors] = {};
  double total = 0.0;

  PYSMOOTH_HD void settle() {
    float each[kGroup];
    for (int v = 0; v < kVectors; ++v) io::store(each + v * kW, lane[v]);
    double sum = 0.0;
    for (const float x : each) sum += static_cast<double>(x);
    total += sum;
    for (vec<float>& x : lane) x = vec<float>{};
  }
};

double code_chunk(const CodedChunk& c) {
  Lanes sums;
  const vec<float> a = vec<float>{} + c.source.a, b = vec<float>{} + c.source.b;
  const float* const g = c.source.g + c.begin;
  const float* const e = c.source.e == nullptr ? nullptr : c.source.e + c.begin;
  float* const out = c.out == nullptr ? nullptr : c.out + c.begin;
  const vec<float> least = vec<float>{} + least_of<float>(c.filter);
  Sieve<float> sieve{nullptr, nullptr, 0};
  if (c.found != nullptr) sieve = {c.found->values, c.found->index, 0};
  for (int64_t i = 0; i < c.length; i += kGroup) {
    const int64_t n = c.length - i < kGroup ? c.length - i : kGroup;
    float tail_g[kGroup] = {}, tail_e[kGroup] = {}, tail_x[kGroup];
    const float *from_g = g + i, *from_e = e == nullptr ? nullptr : e + i;
    if (n < kGroup) {
      std::memcpy(tail_g, from_g, static_cast<size_t>(n) * sizeof(float));
      from_g = tail_g;
      if (e != nullptr) {
        std::memcpy(tail_e, from_e, static_cast<size_t>(n) * sizeof(float));
        from_e = tail_e;
      }
    }
    uint64_t word = 0;
    for (int v = 0; v < kVectors; ++v) {
      vec<float> x = a * io::load(from_g + v * kW);
      if (from_e != nullptr) x = b * io::load(from_e + v * kW) + x;
      sums.lane[v] = sums.lane[v] + magnitude<float>(x);
      if (c.bits != nullptr) word |= static_cast<uint64_t>(mask_bits(x >= vec<float>{})) << v * kW;
      if (c.found != nullptr)
        sieve.take(x, places_from<float>(static_cast<uint32_t>(c.begin + i + v * kW)),
                   reach_bits<float>(x, least));
      if (out != nullptr) io::store(n < kGroup ? tail_x + v * kW : out + i + v * kW, x);
    }
    if (out != nullptr && n < kGroup)
      std::memcpy(out + i, tail_x, static_cast<size_t>(n) * sizeof(float));
    if (c.bits != nullptr) store_word(c.bits + (c.begin + i) / 8, word, n);
    if ((i + kGroup) % kBlock == 0) sums.settle();
  }
  sums.settle();
  if (c.found != nullptr) c.found->count = sieve.count;
  return sums.total;
}

void subtract_chunk(float* x, int64_t n, float scale) {
  const vec<float> plus = vec<float>{} + scale, minus = vec<float>{} - scale;
  int64_t i = 0;
  for (; i + kW <= n; i += kW) {
    const vec<float> v = io::load(x + i);
    io::store(x + i, v - (v >= vec<float>{} ? plus : minus));
  }
  for (; i < n; ++i) x[i] = x[i] - (x[i] >= 0.0f ? scale : -scale);
}

void sum_chunk(const SignMessages& m, int64_t begin, int64_t length, float factor, float* out,
               uint8_t* signs) {
  for (int64_t i = begin; i < begin + length; i += kGroup) {
    const int64_t n = begin + length - i < kGroup ? begin + length - i : kGroup;
    vec<float> sum[kVectors] = {};
    for (int r = 0; r < m.ranks; ++r) {
      const uint64_t word = load_word(m.bits[r] + i / 8, n);
      const float scale = m.scales == nullptr ? 1.0f : m.scales[r];
      for (int v = 0; v < kVectors; ++v)
        sum[v] = sum[v] + load_bits<float>(&word, v * kW, scale, -scale);
    }
    if (out == nullptr) {
      uint64_t word = 0;
      for (int v = 0; v < kVectors; ++v)
        word |= static_cast<uint64_t>(mask_bits(sum[v] >= vec<float>{})) << v * kW;
      store_word(signs + i / 8, word, n);
      continue;
    }
    float tail[kGroup];
    for (int v = 0; v < kVectors; ++v)
      io::store(n < kGroup ? tail + v * kW : out + i + v * kW, sum[v] * factor);
    if (n < kGroup) std::memcpy(out + i, tail, static_cast<size_t>(n) * sizeof(float));
  }
}

}  // namespace

KernelTable codec_table() {
  KernelTable table{};
  table.codec = {code_chunk, subtract_chunk, sum_chunk};
  return table;
}

PYSMOOTH_KERNELS_END

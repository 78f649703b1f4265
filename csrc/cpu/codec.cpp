#include "cpu/codec.h"

#include <cstring>

#include "core/compress.h"
#include "cpu/draw.h"
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

// ---- what is rounded at random

constexpr int kRun = kStagedElements;

// Elements from `begin` on, and whatever fills the last vector.
void evaluate(const CodedSource& s, int64_t begin, int64_t n, float* x) {
  const vec<float> a = vec<float>{} + s.a, b = vec<float>{} + s.b;
  int64_t i = 0;
  for (; i + kW <= n; i += kW) {
    vec<float> v = a * io::load(s.g + begin + i);
    if (s.e != nullptr) v = b * io::load(s.e + begin + i) + v;
    io::store(x + i, v);
  }
  for (; i < n; ++i) {
    x[i] = s.a * s.g[begin + i];
    if (s.e != nullptr) x[i] = s.b * s.e[begin + i] + x[i];
  }
}

double squares_chunk(const CodedSource& s, int64_t begin, int64_t length) {
  constexpr int kSums = 8;
  double sums[kSums] = {};
  for (int64_t done = 0; done < length; done += kRun) {
    const int64_t n = length - done < kRun ? length - done : kRun;
    float x[kRun + kW] = {};
    evaluate(s, begin + done, n, x);
    for (int64_t i = 0; i < n; i += kSums)
      for (int j = 0; j < kSums; ++j) {
        const auto v = static_cast<double>(x[i + j]);
        sums[j] += v * v;
      }
  }
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

// Numbers of a few bits, one after another.
struct Packer {
  uint8_t* to;
  uint64_t pending = 0;
  int held = 0;

  PYSMOOTH_HD void put(uint64_t number, int width) {
    pending |= number << held;
    for (held += width; held >= 8; held -= 8, pending >>= 8) *to++ = static_cast<uint8_t>(pending);
  }
  PYSMOOTH_HD void flush() {
    if (held > 0) *to = static_cast<uint8_t>(pending);
  }
};

int width_of(int levels) { return 33 - __builtin_clz(static_cast<unsigned>(levels)); }

void natural_run(const RoundedChunk& c, int64_t begin, int64_t n, const float* x,
                 const float* drawn, float* sent) {
  using O = ops<vec<float>>;
  for (int64_t i = 0; i < n; i += kGroup) {
    uint64_t word = 0;
    for (int v = 0; v < kGroup; v += kW) {
      const vec<float> s = natural<vec<float>, float>(io::load(x + i + v), io::load(drawn + i + v));
      io::store(sent + i + v, s);
      word |= static_cast<uint64_t>(mask_bits((O::bits(s) >> 31) != 0)) << v;
    }
    store_word(c.signs + (begin + i) / 8, word, n - i < kGroup ? n - i : kGroup);
  }
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, sent + i, sizeof(bits));
    c.bytes[begin + i] = static_cast<uint8_t>(bits >> 23);
  }
}

void levels_run(const RoundedChunk& c, int64_t begin, int64_t n, const float* x, const float* drawn,
                float* sent, Packer* packer) {
  float steps[kRun + kGroup];
  const auto levels = static_cast<float>(c.levels);
  for (int64_t i = 0; i < n;) {
    const int64_t block = (begin + i) / c.block, left = (block + 1) * c.block - (begin + i);
    const int64_t end = left < n - i ? i + left : n;
    for (; i < end; i += kW) {  // beyond the block's end the next one writes again
      const vec<float> v = io::load(x + i);
      const vec<float> k =
          dithered_steps<vec<float>, float>(v, io::load(drawn + i), c.inverse[block], levels);
      const vec<float> s = k * c.unit[block];
      io::store(steps + i, k);
      io::store(sent + i, v < vec<float>{} ? -s : s);
    }
    i = end;
  }
  const int width = width_of(c.levels);
  const auto most = (uint64_t{1} << width) - 1u;
  for (int64_t i = 0; i < n; ++i) {
    const auto k = static_cast<uint64_t>(static_cast<int64_t>(steps[i]));
    packer->put((k << 1 | static_cast<uint64_t>(sent[i] < 0.0f)) & most, width);
  }
}

void rounded_chunk(const RoundedChunk& c) {
  ApplyArgs args{};
  args.begin = c.begin;
  args.step = c.step;
  args.tensor = c.tensor;
  Drawing<float, true> drawing(args, Draw{Draw::bits, c.seed});
  Packer packer{c.signs == nullptr ? c.bytes + c.begin / 8 * width_of(c.levels) : nullptr};
  float x[kRun + kGroup] = {}, sent[kRun + kGroup];
  for (int64_t done = 0; done < c.length; done += kRun) {
    const int64_t n = c.length - done < kRun ? c.length - done : kRun, begin = c.begin + done;
    const float* const drawn = drawing.next(n);
    evaluate(c.source, begin, n, x);
    if (c.signs != nullptr)
      natural_run(c, begin, n, x, drawn, sent);
    else
      levels_run(c, begin, n, x, drawn, sent, &packer);
    for (int64_t i = 0; i < n; ++i) c.out[begin + i] = x[i] - sent[i];
  }
  packer.flush();
}

// Adds a rank's numbers to those of the ranks before it.
void add_natural(const uint8_t* bytes, const uint8_t* signs, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t sign = static_cast<uint32_t>(signs[i / 8] >> i % 8 & 1u) << 31;
    const uint32_t bits = static_cast<uint32_t>(bytes[i]) << 23 | sign;
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    out[i] += x;
  }
}

void add_levels(const RoundedMessages& m, int rank, int64_t begin, int64_t n, float* out) {
  const uint8_t* from = m.first + rank * m.stride + begin / 8 * m.width;
  const uint8_t* const units = m.units + rank * m.stride;
  const uint64_t mask = (uint64_t{1} << m.width) - 1u;
  uint64_t pending = 0;
  int held = 0;
  for (int64_t i = 0; i < n;) {
    const int64_t block = (begin + i) / m.block, left = (block + 1) * m.block - (begin + i);
    const int64_t end = left < n - i ? i + left : n;
    float unit;
    std::memcpy(&unit, units + block * static_cast<int64_t>(sizeof(unit)), sizeof(unit));
    for (; i < end; ++i) {
      for (; held < m.width; held += 8) pending |= static_cast<uint64_t>(*from++) << held;
      const uint64_t coded = pending & mask;
      pending >>= m.width;
      held -= m.width;
      const float size = static_cast<float>(static_cast<int64_t>(coded >> 1)) * unit;
      out[i] += (coded & 1u) != 0 ? -size : size;
    }
  }
}

void sum_rounded_chunk(const RoundedMessages& m, int64_t begin, int64_t length, float* out) {
  for (int64_t i = 0; i < length; ++i) out[begin + i] = 0.0f;
  for (int r = 0; r < m.ranks; ++r) {
    if (m.signs != nullptr)
      add_natural(m.first + r * m.stride + begin, m.signs + r * m.stride + begin / 8, length,
                  out + begin);
    else
      add_levels(m, r, begin, length, out + begin);
  }
}

}  // namespace

KernelTable codec_table() {
  KernelTable table{};
  table.codec = {code_chunk,    subtract_chunk, sum_chunk,
                 squares_chunk, rounded_chunk,  sum_rounded_chunk};
  return table;
}

PYSMOOTH_KERNELS_END

// The codec over whole tensors: chunks for threads, and the choice of the k largest.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "core/compress.h"
#include "cpu/codec.h"
#include "cpu/run.h"
#include "cpu/select.h"

namespace pysmooth {
namespace {

int64_t chunks_of(int64_t n) { return (n + kCodecChunk - 1) / kCodecChunk; }

// body(chunk, first element, elements), on some thread.
template <class Body>
void each_chunk(int64_t n, int threads, Body body) {
  const int64_t count = chunks_of(n);
  const int used = in_forked_child() ? 1 : static_cast<int>(std::min<int64_t>(threads, count));
#pragma omp parallel for num_threads(used > 1 ? used : 1) schedule(static) if (used > 1)
  for (int64_t i = 0; i < count; ++i)
    body(i, i * kCodecChunk, std::min(kCodecChunk, n - i * kCodecChunk));
}

float value_at(const CodedSource& s, int64_t i) {
  const float x = s.a * s.g[i];
  return s.e == nullptr ? x : s.b * s.e[i] + x;
}

// Larger magnitudes first, of equals the earlier ones.
uint64_t rank_of(float value, uint32_t index) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint64_t>(~(bits & 0x7fffffffu)) << 32 | index;
}

// A sample of x suggests how large a candidate is.
double filter_of(const CodedSource& source, int64_t n, int64_t k) {
  SelectUnit unit;
  unit.last_slot = 1;
  unit.elements = n;
  unit.k = k;
  std::vector<Stretch> sample;
  plan_sample(&unit, {n}, {1}, &sample);
  std::vector<uint64_t> keys, scratch;
  for (const Stretch& s : sample)
    for (int64_t i = s.begin; i < s.begin + s.length; ++i)
      keys.push_back(magnitude_key(static_cast<double>(value_at(source, i))));
  if (!sample.empty()) set_filter(&unit, keys, &scratch);
  return unit.filter;
}

}  // namespace

double code(const CodedSource& source, int64_t n, float* out, uint8_t* bits, int threads) {
  std::vector<double> sums(static_cast<size_t>(chunks_of(n)));
  each_chunk(n, threads, [&](int64_t i, int64_t begin, int64_t length) {
    sums[static_cast<size_t>(i)] =
        kernels().codec.code({source, begin, length, out, bits, 0.0, nullptr});
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

void subtract_signs(float* x, int64_t n, float scale, int threads) {
  each_chunk(n, threads, [&](int64_t, int64_t begin, int64_t length) {
    kernels().codec.subtract(x + begin, length, scale);
  });
}

void sum_signs(const SignMessages& messages, int64_t n, float factor, float* out, uint8_t* signs,
               int threads) {
  each_chunk(n, threads, [&](int64_t, int64_t begin, int64_t length) {
    kernels().codec.sum(messages, begin, length, factor, out, signs);
  });
}

double code_top_k(const CodedSource& source, int64_t n, int64_t k, float* out, int64_t* index,
                  float* values, int threads) {
  std::vector<double> sums(static_cast<size_t>(chunks_of(n)));
  std::vector<std::vector<uint64_t>> found(static_cast<size_t>(chunks_of(n)));  // ranks
  int64_t count = 0;
  double filter = filter_of(source, n, k);
  for (;;) {
    each_chunk(n, threads, [&](int64_t i, int64_t begin, int64_t length) {
      const std::unique_ptr<float[]> values(new float[kCandidateRoom]);
      const std::unique_ptr<uint32_t[]> places(new uint32_t[kCandidateRoom]);
      Candidates picked{values.get(), places.get(), 0};
      sums[static_cast<size_t>(i)] =
          kernels().codec.code({source, begin, length, out, nullptr, filter, &picked});
      std::vector<uint64_t>& ranks = found[static_cast<size_t>(i)];
      ranks.clear();
      for (int64_t j = 0; j < picked.count; ++j)
        ranks.push_back(rank_of(picked.values[j], picked.index[j]));
    });
    count = 0;
    for (const auto& ranks : found) count += static_cast<int64_t>(ranks.size());
    if (count >= k || filter <= kAnyMagnitude) break;
    filter = kAnyMagnitude;  // the sample misled
  }
  // In the order of the tensor, as they were found.
  std::vector<uint64_t> ranks;
  ranks.reserve(static_cast<size_t>(count));
  for (const auto& some : found) ranks.insert(ranks.end(), some.begin(), some.end());
  uint64_t last = ~uint64_t{0};
  if (count > k) {
    std::vector<uint64_t> scratch = ranks;
    const auto kth = scratch.begin() + (k - 1);
    std::nth_element(scratch.begin(), kth, scratch.end());
    last = *kth;
  }
  std::vector<uint32_t> chosen;
  chosen.reserve(static_cast<size_t>(k));
  for (const uint64_t rank : ranks)
    if (rank <= last) chosen.push_back(static_cast<uint32_t>(rank));
  if (count < k) {  // all that are not 0, and the first of the others
    std::vector<uint32_t> more;
    size_t at = 0;
    for (uint32_t i = 0; static_cast<int64_t>(more.size() + chosen.size()) < k; ++i) {
      if (at < chosen.size() && chosen[at] == i)
        ++at;
      else
        more.push_back(i);
    }
    chosen.insert(chosen.end(), more.begin(), more.end());
    std::sort(chosen.begin(), chosen.end());
  }
  for (int64_t j = 0; j < k; ++j) {
    index[j] = chosen[static_cast<size_t>(j)];
    values[j] = value_at(source, index[j]);
    if (out != nullptr) out[index[j]] = 0.0f;
  }
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

namespace {

int bits_of(uint64_t x) { return x == 0 ? 0 : 64 - __builtin_clzll(x); }

// Sorted places, `width` bits each.
struct Places {
  const uint8_t* packed;
  int64_t bytes, count;
  int width;

  uint64_t at(int64_t i) const {
    const int64_t bit = i * width;
    uint64_t word = 0;
    std::memcpy(&word, packed + bit / 8,
                static_cast<size_t>(std::min<int64_t>(sizeof(word), bytes - bit / 8)));
    return word >> bit % 8 & ((uint64_t{1} << width) - 1u);
  }
  // The first that is at least `place`.
  int64_t from(int64_t place) const {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (at(middle) < static_cast<uint64_t>(place))
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

float float_at(const uint8_t* values, int64_t i) {
  float x;
  std::memcpy(&x, values + i * static_cast<int64_t>(sizeof(x)), sizeof(x));
  return x;
}

}  // namespace

void sum_top_k(const uint8_t* first, int64_t stride, int ranks, int64_t n, int64_t k, float factor,
               const float* base, float* out, int threads) {
  const int width = bits_of(static_cast<uint64_t>(n - 1));
  const bool bitmap = n < k * width;
  const int64_t bytes = (std::min(k * width, n) + 7) / 8;
  // Of bitmaps: how many of a rank's are marked before each chunk.
  std::vector<int64_t> before;
  if (bitmap)
    for (int r = 0; r < ranks; ++r) {
      const uint8_t* const marks = first + r * stride;
      int64_t count = 0;
      for (int64_t begin = 0; begin < n; begin += kCodecChunk) {
        before.push_back(count);
        const int64_t end = std::min((begin + kCodecChunk) / 8, bytes);
        for (int64_t i = begin / 8; i < end; ++i) count += __builtin_popcount(marks[i]);
      }
    }
  const int64_t chunks = chunks_of(n);
  each_chunk(n, threads, [&](int64_t chunk, int64_t begin, int64_t length) {
    std::memset(out + begin, 0, static_cast<size_t>(length) * sizeof(float));
    for (int r = 0; r < ranks; ++r) {
      const uint8_t* const packed = first + r * stride;
      const uint8_t* const values = packed + bytes;
      if (bitmap) {
        int64_t at = before[static_cast<size_t>(r * chunks + chunk)];
        for (int64_t i = begin; i < begin + length; ++i)
          if ((packed[i / 8] >> i % 8 & 1) != 0 && at < k) out[i] += float_at(values, at++);
        continue;
      }
      const Places places{packed, bytes, k, width};
      for (int64_t i = places.from(begin); i < k; ++i) {
        const auto place = static_cast<int64_t>(places.at(i));
        if (place >= begin + length) break;
        out[place] += float_at(values, i);
      }
    }
    // While the chunk is in the cache.
    for (int64_t i = begin; i < begin + length; ++i) {
      const float sum = factor * out[i];
      out[i] = base == nullptr ? sum : sum + base[i];
    }
  });
}

void code_natural(const CodedSource& source, int64_t n, const Drawn& drawn, float* out,
                  uint8_t* message, int threads) {
  each_chunk(n, threads, [&](int64_t, int64_t begin, int64_t length) {
    kernels().codec.rounded({source, begin, length, drawn.seed, drawn.step, drawn.tensor, out,
                             message, message + n, 0, n, nullptr, nullptr});
  });
}

void sum_natural(const uint8_t* first, int64_t stride, int ranks, int64_t n, float* out,
                 int threads) {
  each_chunk(n, threads, [&](int64_t, int64_t begin, int64_t length) {
    kernels().codec.sum_rounded({first, first + n, stride, ranks, 9, n, nullptr}, begin, length,
                                out);
  });
}

void code_levels(const CodedSource& source, int64_t n, const Drawn& drawn, int levels,
                 int64_t block, float* out, uint8_t* message, int threads) {
  const int64_t blocks = (n + block - 1) / block;
  // Blocks are summed in pieces of chunks, whatever the threads.
  const int64_t pieces = (block + kCodecChunk - 1) / kCodecChunk;
  std::vector<double> sums(static_cast<size_t>(blocks * pieces));
  const int64_t parts = static_cast<int64_t>(sums.size());
  const int used = in_forked_child() ? 1 : static_cast<int>(std::min<int64_t>(threads, parts));
#pragma omp parallel for num_threads(used > 1 ? used : 1) schedule(static) if (used > 1)
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t end = std::min(n, (i / pieces + 1) * block);
    const int64_t begin = std::min(end, i / pieces * block + i % pieces * kCodecChunk);
    sums[static_cast<size_t>(i)] =
        kernels().codec.squares(source, begin, std::min(kCodecChunk, end - begin));
  }
  std::vector<float> units, inverses;
  for (int64_t b = 0; b < blocks; ++b) {
    double total = 0.0;
    for (int64_t i = 0; i < pieces; ++i) total += sums[static_cast<size_t>(b * pieces + i)];
    const double h[] = {static_cast<double>(CompressorKind::qsgd), static_cast<double>(levels)};
    const baseline::Compressor<float> compressor(h, std::sqrt(total));
    units.push_back(compressor.scale);
    inverses.push_back(compressor.inverse);
  }
  std::memcpy(message, units.data(), units.size() * sizeof(float));
  uint8_t* const numbers = message + blocks * static_cast<int64_t>(sizeof(float));
  each_chunk(n, threads, [&](int64_t, int64_t begin, int64_t length) {
    kernels().codec.rounded({source, begin, length, drawn.seed, drawn.step, drawn.tensor, out,
                             numbers, nullptr, levels, block, units.data(), inverses.data()});
  });
}

void sum_levels(const uint8_t* first, int64_t stride, int ranks, int64_t n, int levels,
                int64_t block, float* out, int threads) {
  const int64_t blocks = (n + block - 1) / block;
  const int width = 1 + bits_of(static_cast<uint64_t>(levels));
  each_chunk(n, threads, [&](int64_t, int64_t begin, int64_t length) {
    kernels().codec.sum_rounded({first + blocks * static_cast<int64_t>(sizeof(float)), nullptr,
                                 stride, ranks, width, block, first},
                                begin, length, out);
  });
}

void pack_bits(const int64_t* numbers, int64_t n, int width, uint8_t* out) {
  uint64_t pending = 0;
  int held = 0;
  for (int64_t i = 0; i < n; ++i) {
    pending |= static_cast<uint64_t>(numbers[i]) << held;
    for (held += width; held >= 8; held -= 8, pending >>= 8) *out++ = static_cast<uint8_t>(pending);
  }
  if (held > 0) *out = static_cast<uint8_t>(pending);
}

void unpack_bits(const uint8_t* packed, int64_t n, int width, int64_t* numbers) {
  const uint64_t mask = (uint64_t{1} << width) - 1u;
  uint64_t pending = 0;
  int held = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (; held < width; held += 8) pending |= static_cast<uint64_t>(*packed++) << held;
    numbers[i] = static_cast<int64_t>(pending & mask);
    pending >>= width;
    held -= width;
  }
}

}  // namespace pysmooth

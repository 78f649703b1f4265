// The codec over whole tensors: chunks for threads, and the choice of the k largest.

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

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
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return total;
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

void code_top_k(const CodedSource& source, int64_t n, int64_t k, float* out, int64_t* index,
                float* values, int threads) {
  std::vector<std::vector<uint64_t>> found(static_cast<size_t>(chunks_of(n)));  // ranks
  int64_t count = 0;
  double filter = filter_of(source, n, k);
  for (;;) {
    each_chunk(n, threads, [&](int64_t i, int64_t begin, int64_t length) {
      const std::unique_ptr<float[]> values(new float[kCandidateRoom]);
      const std::unique_ptr<uint32_t[]> places(new uint32_t[kCandidateRoom]);
      Candidates picked{values.get(), places.get(), 0};
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
  std::vector<uint64_t> ranks;
  ranks.reserve(static_cast<size_t>(count));
  for (const auto& some : found) ranks.insert(ranks.end(), some.begin(), some.end());
  if (count > k) {
    std::nth_element(ranks.begin(), ranks.begin() + (k - 1), ranks.end());
    ranks.resize(static_cast<size_t>(k));
  }
  std::vector<uint32_t> chosen;
  for (const uint64_t rank : ranks) chosen.push_back(static_cast<uint32_t>(rank));
  std::sort(chosen.begin(), chosen.end());
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
    values[j] = out[index[j]];
    out[index[j]] = 0.0f;
  }
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

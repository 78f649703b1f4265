#include "cpu/select.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/random.h"

namespace pysmooth {
namespace {

constexpr int64_t kLine = 16;      // elements of a sampled line
constexpr int64_t kDirect = 4096;  // a unit of so few elements is selected from as a whole
constexpr int64_t kMostLines = 4096;

double value_of(uint64_t key) {
  double out;
  std::memcpy(&out, &key, sizeof(out));
  return out;
}

// The k-th largest of the keys, 1 <= k <= size; the order of the keys is lost.
uint64_t kth_largest(std::vector<uint64_t>* keys, int64_t k) {
  // Magnitudes of candidates share few exponents: one pass over their leading bits leaves little.
  constexpr int kShift = 48, kBuckets = 1 << (63 - kShift);
  if (keys->size() > 4096) {
    static thread_local std::vector<int64_t> histogram;
    histogram.assign(kBuckets, 0);
    for (const uint64_t key : *keys) ++histogram[key >> kShift];
    int64_t above = 0;
    int bucket = kBuckets - 1;
    while (above + histogram[static_cast<size_t>(bucket)] < k)
      above += histogram[static_cast<size_t>(bucket--)];
    k -= above;
    const auto wanted = static_cast<uint64_t>(bucket);
    keys->erase(std::remove_if(keys->begin(), keys->end(),
                               [&](uint64_t key) { return key >> kShift != wanted; }),
                keys->end());
  }
  const auto at = keys->begin() + (k - 1);
  std::nth_element(keys->begin(), at, keys->end(), std::greater<>());
  return *at;
}

}  // namespace

uint64_t magnitude_key(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits & ~(uint64_t{1} << 63);
}

int64_t SelectSpec::chosen_of(int64_t elements) const {
  if (elements == 0) return 0;
  const double wanted = std::ceil(ratio * static_cast<double>(elements));
  const int64_t count = ratio > 0.0 ? static_cast<int64_t>(wanted) : k;
  return std::min(elements, std::max<int64_t>(1, count));
}

void sample_filter(SelectUnit* unit, const std::vector<int64_t>& numels,
                   const std::vector<char>& active, const ReadValues& read,
                   std::vector<double>* scratch) {
  unit->filter = kAnyMagnitude;
  unit->complete = true;
  unit->second_look = false;
  const int64_t d = unit->elements;
  if (d <= kDirect || unit->k == 0) return;
  const int64_t lines = std::clamp<int64_t>(d / 128, 64, kMostLines);
  scratch->resize(static_cast<size_t>(lines * kLine));
  double* out = scratch->data();
  size_t slot = unit->first_slot;
  int64_t before = 0;  // elements of the active slots before this one
  for (int64_t line = 0; line < lines; ++line) {
    // One line at random from each of as many equal stretches.
    const int64_t begin = d / kLine * line / lines, end = d / kLine * (line + 1) / lines;
    int64_t at = begin + mix32(static_cast<uint32_t>(line) + 1) % std::max<int64_t>(1, end - begin);
    at *= kLine;
    while (!active[slot] || at >= before + numels[slot]) {
      if (active[slot]) before += numels[slot];
      ++slot;
    }
    const int64_t length = std::min(kLine, before + numels[slot] - at);
    read(slot, at - before, length, false, out);
    out += length;
  }
  scratch->resize(static_cast<size_t>(out - scratch->data()));
  const auto size = static_cast<int64_t>(scratch->size());
  const double expected =
      static_cast<double>(unit->k) / static_cast<double>(d) * static_cast<double>(size);
  const auto rank = static_cast<int64_t>(expected + 5.0 * std::sqrt(expected) + 8.0);
  if (rank >= size) return;
  std::vector<uint64_t> keys(scratch->size());
  std::transform(scratch->begin(), scratch->end(), keys.begin(), magnitude_key);
  const uint64_t key = kth_largest(&keys, rank + 1);
  if (key == 0) return;
  unit->filter = value_of(key);
  unit->complete = false;
}

int64_t candidate_limit(const SelectUnit& unit) {
  return unit.elements <= kDirect ? kDirect : 4 * unit.k + unit.elements / 16 + 4096;
}

bool choose(SelectUnit* unit, const ChunkTable& chunks, const std::vector<char>& active,
            const std::vector<int64_t>& counts, std::vector<std::vector<Candidate>>* lists,
            std::vector<uint64_t>* scratch) {
  const auto each_chunk = [&](auto body) {
    for (size_t t = unit->first_slot; t < unit->last_slot; ++t) {
      if (!active[t]) continue;
      for (int64_t i = chunks.first(static_cast<int64_t>(t));
           i < chunks.first(static_cast<int64_t>(t) + 1); ++i)
        body(static_cast<size_t>(i));
    }
  };
  int64_t found = 0;
  each_chunk([&](size_t i) { found += counts[i]; });
  if (unit->k == 0) {
    each_chunk([&](size_t i) { (*lists)[i].clear(); });
    return true;
  }
  if (found > candidate_limit(*unit) || (found < unit->k && !unit->complete)) return false;
  if (found <= unit->k) return true;
  scratch->clear();
  each_chunk([&](size_t i) {
    for (const Candidate& c : (*lists)[i]) scratch->push_back(magnitude_key(c.value));
  });
  const uint64_t threshold = kth_largest(scratch, unit->k);
  int64_t ties = unit->k;
  each_chunk([&](size_t i) {
    for (const Candidate& c : (*lists)[i]) ties -= magnitude_key(c.value) > threshold ? 1 : 0;
  });
  each_chunk([&](size_t i) {
    std::vector<Candidate>& list = (*lists)[i];
    size_t kept = 0;
    for (const Candidate& c : list) {
      const uint64_t key = magnitude_key(c.value);
      if (key > threshold || (key == threshold && ties-- > 0)) list[kept++] = c;
    }
    list.resize(kept);
  });
  return true;
}

int64_t choose_blocks(const SelectSpec& spec, int64_t length, const Candidate* candidates,
                      int64_t count, Candidate* out, std::vector<uint64_t>* scratch) {
  int64_t kept = 0, next = 0;
  for (int64_t begin = 0; begin < length; begin += spec.block) {
    const int64_t size = std::min(spec.block, length - begin);
    const int64_t k = spec.chosen_of(size);
    const int64_t first = next;
    while (next < count && candidates[next].index < static_cast<uint64_t>(begin + size)) ++next;
    if (next - first <= k) {
      kept = std::copy(candidates + first, candidates + next, out + kept) - out;
      continue;
    }
    scratch->clear();
    for (int64_t i = first; i < next; ++i) scratch->push_back(magnitude_key(candidates[i].value));
    const uint64_t threshold = kth_largest(scratch, k);
    int64_t ties = k;
    for (int64_t i = first; i < next; ++i)
      ties -= magnitude_key(candidates[i].value) > threshold ? 1 : 0;
    for (int64_t i = first; i < next; ++i) {
      const uint64_t key = magnitude_key(candidates[i].value);
      if (key > threshold || (key == threshold && ties-- > 0)) out[kept++] = candidates[i];
    }
  }
  return kept;
}

void RadixSelection::count(const double* values, int64_t n, int64_t* histogram) const {
  const int low = std::max(0, shift_ - kDigitBits);
  const uint64_t mask = (uint64_t{1} << (shift_ - low)) - 1;
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t key = magnitude_key(values[i]);
    if (key >> shift_ == prefix_ >> shift_) ++histogram[key >> low & mask];
  }
}

void RadixSelection::narrow(const int64_t* histogram) {
  const int low = std::max(0, shift_ - kDigitBits);
  const int digits = 1 << (shift_ - low);
  int digit = digits - 1;
  while (digit > 0 && histogram[digit] < left_) left_ -= histogram[digit--];
  prefix_ |= static_cast<uint64_t>(digit) << low;
  shift_ = low;
}

int64_t RadixSelection::equals(const double* values, int64_t n) const {
  return std::count_if(values, values + n,
                       [this](double value) { return magnitude_key(value) == prefix_; });
}

void RadixSelection::take(const double* values, int64_t n, int64_t ties_before,
                          std::vector<Candidate>* list) const {
  int64_t ties = prefix_ == 0 ? 0 : left_ - ties_before;  // zeros are never chosen
  list->clear();
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t key = magnitude_key(values[i]);
    if (key > prefix_ || (key == prefix_ && ties-- > 0))
      list->push_back({values[i], static_cast<uint32_t>(i)});
  }
}

}  // namespace pysmooth

#include "cpu/select.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/random.h"

namespace pysmooth {
namespace {

constexpr int64_t kLine = 16;      // elements of a sampled line
constexpr int64_t kDirect = 4096;  // a unit of so few elements is selected from as a whole
constexpr int64_t kMostLines = 512;

double value_of(uint64_t key) {
  double out;
  std::memcpy(&out, &key, sizeof(out));
  return out;
}

// The k-th largest of many keys, and how many of its equals belong to the k largest.
struct Kth {
  uint64_t key;
  int64_t ties;
};

// Of the keys, whose order is lost; 1 <= k <= size.
Kth kth_of_few(std::vector<uint64_t>* keys, int64_t k) {
  const auto at = keys->begin() + (k - 1);
  std::nth_element(keys->begin(), at, keys->end(), std::greater<>());
  const uint64_t key = *at;
  return {key, k - std::count_if(keys->begin(), at, [key](uint64_t x) { return x > key; })};
}

// Of keys that each(body) hands to body, none of them below `least`. They lie close together, and
// the k-th among the least of them: buckets that start there, 1/64 of an octave wide, leave few.
template <class Each>
Kth kth_largest(Each each, uint64_t least, int64_t k, std::vector<uint64_t>* scratch) {
  constexpr int kShift = 46, kBuckets = 1024;
  const auto bucket_of = [least](uint64_t key) {
    return std::min<uint64_t>((key - least) >> kShift, kBuckets - 1);
  };
  int64_t histogram[kBuckets] = {};
  each([&](uint64_t key) { ++histogram[bucket_of(key)]; });
  int bucket = kBuckets - 1;
  while (histogram[bucket] < k) k -= histogram[bucket--];
  const auto wanted = static_cast<uint64_t>(bucket);
  scratch->clear();
  each([&](uint64_t key) {
    if (bucket_of(key) == wanted) scratch->push_back(key);
  });
  return kth_of_few(scratch, k);
}

// Of the candidates [first, last) those above the threshold, and the first `ties` equal to it.
Candidate* keep(const Candidate* first, const Candidate* last, uint64_t threshold, int64_t* ties,
                Candidate* out) {
  for (; first != last; ++first) {
    const uint64_t key = magnitude_key(first->value);
    *out = *first;  // without a branch: one in four does not stay, and nobody could predict which
    out += key > threshold ? 1 : 0;
    if (key == threshold && (*ties)-- > 0) ++out;
  }
  return out;
}

}  // namespace

uint64_t magnitude_key(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits & ~(uint64_t{1} << 63);
}

void plan_sample(SelectUnit* unit, const std::vector<int64_t>& numels,
                 const std::vector<char>& active, std::vector<Stretch>* sample) {
  unit->filter = kAnyMagnitude;
  unit->complete = true;
  unit->second_look = false;
  sample->clear();
  const int64_t d = unit->elements;
  if (d <= kDirect || unit->k == 0) return;
  const int64_t lines = std::clamp<int64_t>(d / 128, 64, kMostLines);
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
    sample->push_back({slot, at - before, std::min(kLine, before + numels[slot] - at)});
  }
}

void set_filter(SelectUnit* unit, std::vector<uint64_t>* keys) {
  const auto size = static_cast<double>(keys->size());
  const double expected = static_cast<double>(unit->k) / static_cast<double>(unit->elements) * size;
  const double rank = std::floor(expected + 5.0 * std::sqrt(expected) + 8.0);
  if (rank >= size) return;
  const uint64_t key = kth_of_few(keys, static_cast<int64_t>(rank) + 1).key;
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
  const auto each_key = [&](auto body) {
    each_chunk([&](size_t i) {
      for (const Candidate& c : (*lists)[i]) body(magnitude_key(c.value));
    });
  };
  uint64_t least = magnitude_key(unit->filter);
  if (unit->complete) {
    least = ~uint64_t{0};
    each_key([&](uint64_t key) { least = std::min(least, key); });
  }
  Kth kth = kth_largest(each_key, least, unit->k, scratch);
  each_chunk([&](size_t i) {
    std::vector<Candidate>& list = (*lists)[i];
    Candidate* const begin = list.data();
    list.resize(
        static_cast<size_t>(keep(begin, begin + list.size(), kth.key, &kth.ties, begin) - begin));
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
    Kth kth = kth_of_few(scratch, k);
    kept = keep(candidates + first, candidates + next, kth.key, &kth.ties, out + kept) - out;
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

#include "cpu/select.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <type_traits>

#include "core/random.h"

namespace pysmooth {
namespace {

constexpr int64_t kLine = 16;      // elements of a sampled line
constexpr int64_t kDirect = 4096;  // a unit of so few elements is selected from as a whole
constexpr int64_t kMostLines = 512;
constexpr int64_t kFew = 256;  // keys that are not worth sorting into buckets

double value_of(uint64_t key) {
  double out;
  std::memcpy(&out, &key, sizeof(out));
  return out;
}

// The k-th largest of many keys; how many of its equals belong to the k largest, and how many there
// are.
struct Kth {
  uint64_t key;
  int64_t ties, equals;
};

// Of the keys, whose order is lost; 1 <= k <= size.
Kth kth_of_few(std::vector<uint64_t>* keys, int64_t k) {
  const auto at = keys->begin() + (k - 1);
  std::nth_element(keys->begin(), at, keys->end(), std::greater<>());
  const uint64_t key = *at;
  const auto equal = [key](uint64_t x) { return x == key; };
  const int64_t above = std::count_if(keys->begin(), at, [key](uint64_t x) { return x > key; });
  return {key, k - above, k - above + std::count_if(at + 1, keys->end(), equal)};
}

// Keys by size: buckets of equal width in the logarithm, roughly; the last one has no end.
struct Buckets {
  uint64_t least;
  int shift, count;
  int of(uint64_t key) const {
    const uint64_t bucket = (key - least) >> shift, last = static_cast<uint64_t>(count) - 1;
    return static_cast<int>(bucket < last ? bucket : last);
  }
};
Buckets tally_buckets(double filter) { return {magnitude_key(filter), 43, kTallyBuckets}; }

// Of the keys that each(body) hands to body, `sizes` of them in each bucket.
template <class Each>
Kth kth_largest(Each each, const Buckets& buckets, const uint32_t* sizes, int64_t k,
                std::vector<uint64_t>* scratch) {
  int bucket = buckets.count - 1;
  while (sizes[bucket] < k) k -= sizes[bucket--];
  const uint64_t first = buckets.least + (static_cast<uint64_t>(bucket) << buckets.shift);
  const uint64_t width = bucket == buckets.count - 1 ? ~uint64_t{0} : uint64_t{1} << buckets.shift;
  scratch->clear();
  each([&](uint64_t key) {
    if (key - first < width && key >= first) scratch->push_back(key);
  });
  return kth_of_few(scratch, k);
}

// Of keys of any size.
template <class Each>
Kth kth_of_any(Each each, int64_t k, std::vector<uint64_t>* scratch) {
  constexpr Buckets kHalfOctaves{0, 51, 4096};
  static thread_local std::vector<uint32_t> sizes;
  sizes.assign(4096, 0);
  each([&](uint64_t key) { ++sizes[static_cast<size_t>(kHalfOctaves.of(key))]; });
  return kth_largest(each, kHalfOctaves, sizes.data(), k, scratch);
}

// Calls body with the values, as what they are.
template <class Body>
auto with_values(const Picks& picks, Body body) {
  return picks.wide ? body(static_cast<double*>(picks.values))
                    : body(static_cast<float*>(picks.values));
}

template <class Body>
void each_key(const Picks& picks, Body body) {
  with_values(picks, [&](auto* values) {
    for (int64_t i = 0, n = picks.count; i < n; ++i)
      body(magnitude_key(static_cast<double>(values[i])));
  });
}

// Moves picks of [first, last) to `to` that are above the threshold, and the first `ties` equal to
// it; returns where they end.
int64_t keep(const Picks& picks, int64_t first, int64_t last, uint64_t threshold, int64_t ties,
             int64_t to) {
  return with_values(picks, [&](auto* values) {
    for (int64_t i = first; i < last; ++i) {
      const uint64_t key = magnitude_key(static_cast<double>(values[i]));
      values[to] = values[i];  // without a branch: nobody could predict which ones stay
      picks.index[to] = picks.index[i];
      to += key > threshold ? 1 : 0;
      if (key == threshold && ties-- > 0) ++to;
    }
    return to;
  });
}

// Zeroes those that equal the threshold, but for the first `ties`: a zero is never chosen. Returns
// how many of these are left.
int64_t drop_ties(const Picks& picks, double threshold, int64_t ties) {
  return with_values(picks, [&](auto* values) {
    const auto equals = [&](auto value) {
      return std::fabs(static_cast<double>(value)) == threshold;
    };
    if (std::none_of(values, values + picks.count, equals)) return ties;
    for (int64_t i = 0; i < picks.count; ++i)
      if (equals(values[i]) && ties-- <= 0) values[i] = 0;
    return std::max<int64_t>(ties, 0);
  });
}

}  // namespace

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

void set_filter(SelectUnit* unit, const std::vector<uint64_t>& keys,
                std::vector<uint64_t>* scratch) {
  const auto size = static_cast<double>(keys.size());
  const double expected = static_cast<double>(unit->k) / static_cast<double>(unit->elements) * size;
  const double rank = std::floor(expected + 5.0 * std::sqrt(expected) + 8.0);
  if (rank >= size) return;
  const auto each = [&](auto body) {
    for (const uint64_t key : keys) body(key);
  };
  const uint64_t key = kth_of_any(each, static_cast<int64_t>(rank) + 1, scratch).key;
  if (key == 0) return;
  unit->filter = value_of(key);
  unit->complete = false;
}

int64_t candidate_limit(const SelectUnit& unit) {
  return unit.elements <= kDirect ? kDirect : 4 * unit.k + unit.elements / 16 + 4096;
}

void tally(const Picks& picks, double filter, uint32_t* buckets) {
  const Buckets of = tally_buckets(filter);
  each_key(picks, [&](uint64_t key) { ++buckets[of.of(key)]; });
}

bool choose(SelectUnit* unit, const std::vector<size_t>& chunks, int64_t found,
            const uint32_t* buckets, std::vector<Picks>* lists, std::vector<uint64_t>* scratch) {
  unit->threshold = 0.0;
  if (found > candidate_limit(*unit) || (found < unit->k && !unit->complete)) return false;
  if (found <= unit->k) return true;
  const auto each = [&](auto body) {
    for (const size_t i : chunks) each_key((*lists)[i], body);
  };
  Kth kth;
  if (!unit->complete) {
    kth = kth_largest(each, tally_buckets(unit->filter), buckets, unit->k, scratch);
  } else if (found > kFew) {
    kth = kth_of_any(each, unit->k, scratch);
  } else {
    scratch->clear();
    each([&](uint64_t key) { scratch->push_back(key); });
    kth = kth_of_few(scratch, unit->k);
  }
  unit->threshold = value_of(kth.key);
  if (kth.ties == kth.equals) return true;
  for (const size_t i : chunks) kth.ties = drop_ties((*lists)[i], unit->threshold, kth.ties);
  return true;
}

void choose_blocks(const SelectSpec& spec, int64_t length, Picks* picks,
                   std::vector<uint64_t>* scratch) {
  int64_t kept = 0, next = 0;
  for (int64_t begin = 0; begin < length; begin += spec.block) {
    const int64_t size = std::min(spec.block, length - begin);
    const int64_t k = spec.chosen_of(size);
    const int64_t first = next;
    while (next < picks->count && picks->index[next] < static_cast<uint64_t>(begin + size)) ++next;
    Kth kth{0, 0, 0};  // all of them
    if (next - first > k) {
      scratch->clear();
      with_values(*picks, [&](auto* values) {
        for (int64_t i = first; i < next; ++i)
          scratch->push_back(magnitude_key(static_cast<double>(values[i])));
      });
      kth = kth_of_few(scratch, k);
    }
    kept = keep(*picks, first, next, kth.key, kth.ties, kept);
  }
  picks->count = kept;
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
                          Picks* picks) const {
  int64_t ties = prefix_ == 0 ? 0 : left_ - ties_before;  // zeros are never chosen
  picks->count = 0;
  with_values(*picks, [&](auto* out) {
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t key = magnitude_key(values[i]);
      if (key < prefix_ || (key == prefix_ && ties-- <= 0)) continue;
      out[picks->count] = static_cast<std::remove_pointer_t<decltype(out)>>(values[i]);
      picks->index[picks->count++] = static_cast<uint32_t>(i);
    }
  });
}

}  // namespace pysmooth

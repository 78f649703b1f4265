// select: which coordinates of a unit (a tensor, all tensors, or a block) are the k largest by
// magnitude. Exact; of equals the first ones.
//
// Finding the k-th of n values takes several passes over them. Instead a sample of the values
// suggests a filter that a little more than k of them reach; these candidates are collected while
// the values pass by anyway. At least k candidates hold the k largest, ties included, whatever the
// sample was: then the rest is a selection among few. Otherwise the values are looked at again, in
// as many passes as a radix selection needs; it is counted how often.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "core/chunks.h"
#include "core/step.h"
#include "cpu/picks.h"

namespace pysmooth {

// Orders finite magnitudes; an infinity comes above them, a NaN above all.
inline uint64_t magnitude_key(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits & ~(uint64_t{1} << 63);
}

// A unit: consecutive slots. Its members are the active ones.
struct SelectUnit {
  size_t first_slot = 0, last_slot = 0;  // [first, last)
  int64_t elements = 0, k = 0;
  double filter = 0.0;    // least magnitude of a candidate
  bool complete = false;  // the filter lets every value but zeros pass
  bool second_look = false;
  double threshold = 0.0;  // least magnitude of the candidates that are chosen; 0: all are
};

// The least filter: nothing but zeros is below.
constexpr double kAnyMagnitude = 4.9406564584124654e-324;

// Which elements to sample, before the pass over them; none where the unit is selected from as a
// whole. The filter is reset to let everything pass.
void plan_sample(SelectUnit* unit, const std::vector<int64_t>& numels,
                 const std::vector<char>& active, std::vector<Stretch>* sample);

// The filter that a sample suggests; `keys` are its magnitudes.
void set_filter(SelectUnit* unit, const std::vector<uint64_t>& keys,
                std::vector<uint64_t>* scratch);

// More candidates than this are not kept: the filter was misled.
int64_t candidate_limit(const SelectUnit& unit);

// How many candidates of each size there are: buckets of 1/512 of an octave, from the filter on.
// The last one is for all that are larger; the k-th largest is hardly ever among these.
constexpr int kTallyBuckets = 1024;
void tally(const Picks& picks, double filter, uint32_t* buckets);

// Finds the unit's threshold. Of those candidates that equal it, the ones that are too many are
// zeroed in their lists. False if there are too few candidates, or too many to have been kept: a
// second look is needed. `buckets`: the tally of all candidates, where the filter is not complete.
bool choose(SelectUnit* unit, const std::vector<size_t>& chunks, int64_t found,
            const uint32_t* buckets, std::vector<Picks>* lists, std::vector<uint64_t>* scratch);

// Leaves the k largest of each block of consecutive elements of a chunk.
void choose_blocks(const SelectSpec& spec, int64_t length, Picks* picks,
                   std::vector<uint64_t>* scratch);

// The second look: radix selection, one digit at a time, then a last look that collects.
class RadixSelection {
 public:
  static constexpr int kDigitBits = 11;
  static constexpr int kDigits = 1 << kDigitBits;

  explicit RadixSelection(int64_t k) : left_(k) {}
  bool settled() const { return shift_ == 0; }
  void count(const double* values, int64_t n, int64_t* histogram) const;
  void narrow(const int64_t* histogram);  // consumes a digit
  // Once settled: how many of the values equal the threshold, and who is chosen. `ties` is how
  // many equals came before; it is advanced.
  int64_t equals(const double* values, int64_t n) const;
  void take(const double* values, int64_t n, int64_t ties_before, Picks* picks) const;

 private:
  uint64_t prefix_ = 0;
  int shift_ = 63;  // bits not yet looked at
  int64_t left_;    // how many of those equal to the prefix are among the k
};

}  // namespace pysmooth

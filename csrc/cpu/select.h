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
#include <vector>

#include "core/chunks.h"
#include "core/step.h"
#include "cpu/kernels.h"

namespace pysmooth {

// Orders finite magnitudes; an infinity comes above them, a NaN above all.
uint64_t magnitude_key(double value);

// A few consecutive elements of a slot.
struct Stretch {
  size_t slot;
  int64_t begin, length;
};

// A unit: consecutive slots. Its members are the active ones.
struct SelectUnit {
  size_t first_slot = 0, last_slot = 0;  // [first, last)
  int64_t elements = 0, k = 0;
  double filter = 0.0;    // least magnitude of a candidate
  bool complete = false;  // the filter lets every value but zeros pass
  bool second_look = false;
};

// The least filter: nothing but zeros is below.
constexpr double kAnyMagnitude = 4.9406564584124654e-324;

// Which elements to sample, before the pass over them; none where the unit is selected from as a
// whole. The filter is reset to let everything pass.
void plan_sample(SelectUnit* unit, const std::vector<int64_t>& numels,
                 const std::vector<char>& active, std::vector<Stretch>* sample);

// The filter that a sample suggests; `keys` are its magnitudes, whose order is lost.
void set_filter(SelectUnit* unit, std::vector<uint64_t>* keys);

// More candidates than this are not kept: the filter was misled.
int64_t candidate_limit(const SelectUnit& unit);

// Leaves the unit's k largest in the lists of its chunks. False if there are too few, or too many
// to have been kept: a second look is needed.
bool choose(SelectUnit* unit, const ChunkTable& chunks, const std::vector<char>& active,
            const std::vector<int64_t>& counts, std::vector<std::vector<Candidate>>* lists,
            std::vector<uint64_t>* scratch);

// The k largest of each block of consecutive elements, within one chunk.
int64_t choose_blocks(const SelectSpec& spec, int64_t length, const Candidate* candidates,
                      int64_t count, Candidate* out, std::vector<uint64_t>* scratch);

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
  void take(const double* values, int64_t n, int64_t ties_before,
            std::vector<Candidate>* list) const;

 private:
  uint64_t prefix_ = 0;
  int shift_ = 63;  // bits not yet looked at
  int64_t left_;    // how many of those equal to the prefix are among the k
};

}  // namespace pysmooth

// Who does which chunks: equal shares, or first come first served.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "core/chunks.h"
#include "core/rule.h"

namespace pysmooth {

// A share of the chunks per thread keeps small models in each core's cache from pass to pass.
// Above this size caches do not matter, and chunks are handed out as threads ask for them, so that
// a thread which the system slows down holds nobody up.
constexpr int64_t kStaticElements = int64_t{1} << 22;
constexpr int64_t kGrab = 4;

// The passes of a step, each with a counter of its own.
enum PassName : int {
  kReducePass,
  kRowsPass,
  kApplyPass,
  kSourcePass,                               // and those after it
  kSelectedPass = kSourcePass + kMaxStages,  // the same
  kPasses = kSelectedPass + kMaxSelections
};

class Schedule {
 public:
  Schedule(const ChunkTable& chunks, int threads)
      : count_(chunks.size()), shared_(chunks.total() < kStaticElements) {
    if (shared_) bounds_ = chunks.split(threads);
  }
  template <class Body>
  void run(int share, int pass, Body body) {
    if (shared_) {
      for (int64_t i = bounds_[static_cast<size_t>(share)];
           i < bounds_[static_cast<size_t>(share) + 1]; ++i)
        body(i);
      return;
    }
    for (;;) {
      const int64_t begin = next_[pass].fetch_add(kGrab, std::memory_order_relaxed);
      if (begin >= count_) return;
      for (int64_t i = begin; i < std::min(begin + kGrab, count_); ++i) body(i);
    }
  }

 private:
  int64_t count_;
  bool shared_;
  std::vector<int64_t> bounds_;
  std::atomic<int64_t> next_[kPasses] = {};
};

}  // namespace pysmooth

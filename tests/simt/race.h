// Which accesses of a kernel are ordered, and which are a race.
//
// Every thread counts its steps, and knows how far every other thread was when it last heard of it
// (a vector clock). Barriers, warp exchanges, and atomics between fences pass that knowledge on.
// Two accesses to the same pair of bytes, one of them a write, are a race if neither thread knew of
// the other's, and not both are atomic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace simt {

using Clock = std::vector<uint32_t>;

inline void join(Clock* into, const Clock& from) {
  for (size_t i = 0; i < from.size(); ++i)
    if (from[i] > (*into)[i]) (*into)[i] = from[i];
}

// What a thread knows.
struct Knowledge {
  uint32_t self = 0;
  Clock now;
  Clock fenced;   // what its last fence lets others learn through an atomic
  Clock learned;  // from atomics; known after the next fence

  void begin(uint32_t index, uint32_t threads) {
    self = index;
    now.assign(threads, 0);
    fenced.assign(threads, 0);
    learned.assign(threads, 0);
    now[self] = 1;
  }
  void step() { ++now[self]; }
  void fence() {
    join(&now, learned);
    fenced = now;
    step();
  }
};

class RaceCheck {
 public:
  void clear() {
    cells_.clear();
    atomics_.clear();
  }
  void forget(const void* begin, size_t bytes);  // the memory gets another meaning
  // Empty, or what the access collides with.
  std::string access(const Knowledge& by, const void* at, size_t bytes, bool writes, bool atomic);
  // The thread is about to change the variable atomically.
  void atomic(Knowledge* by, const void* at);

 private:
  struct Seen {
    uint32_t thread, clock;
    bool atomic;
  };
  struct Cell {
    bool written = false;
    Seen write{};
    std::vector<Seen> reads;
  };
  static uintptr_t unit(const void* at) { return reinterpret_cast<uintptr_t>(at) / 2; }
  std::unordered_map<uintptr_t, Cell> cells_;
  std::unordered_map<uintptr_t, Clock> atomics_;
};

}  // namespace simt

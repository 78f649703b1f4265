#include "race.h"

#include <algorithm>

#include "memory.h"
#include "simt.h"

namespace simt {

void RaceCheck::forget(const void* begin, size_t bytes) {
  for (uintptr_t u = unit(begin); u <= unit(static_cast<const char*>(begin) + bytes - 1); ++u)
    cells_.erase(u);
}

std::string RaceCheck::access(const Knowledge& by, const void* at, size_t bytes, bool writes,
                              bool atomic) {
  const auto collides = [&](const Seen& x) {
    return x.thread != by.self && by.now[x.thread] < x.clock && !(atomic && x.atomic);
  };
  const auto what = [&](const Seen& x, const char* did) {
    return "race: thread " + std::to_string(by.self) + (writes ? " writes" : " reads") +
           " what thread " + std::to_string(x.thread) + did;
  };
  const Seen mine{by.self, by.now[by.self], atomic};
  for (uintptr_t u = unit(at); u <= unit(static_cast<const char*>(at) + bytes - 1); ++u) {
    Cell& cell = cells_[u];
    if (cell.written && collides(cell.write)) return what(cell.write, " wrote");
    if (writes) {
      for (const Seen& read : cell.reads)
        if (collides(read)) return what(read, " read");
      cell.reads.clear();
      cell.written = true;
      cell.write = mine;
    } else {
      // Reads that this one knows of need not be kept.
      std::vector<Seen>& reads = cell.reads;
      reads.erase(std::remove_if(reads.begin(), reads.end(),
                                 [&](const Seen& x) { return by.now[x.thread] >= x.clock; }),
                  reads.end());
      reads.push_back(mine);
    }
  }
  return "";
}

void RaceCheck::atomic(Knowledge* by, const void* at) {
  Clock& known = atomics_[reinterpret_cast<uintptr_t>(at)];
  known.resize(by->now.size());
  join(&by->learned, known);
  join(&known, by->fenced);
}

}  // namespace simt

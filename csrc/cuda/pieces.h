// Into which pieces tensors are cut.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/plan.h"

namespace pysmooth::cuda {

constexpr int kRows = kPassElements / kRow;  // that a team takes at most
constexpr int64_t kSelectPiece = 8192;       // elements that a block looks at

// Teams of a warp where each thread holds so many elements.
constexpr int teams_of(int group) { return kWarp / (kRow / group); }
constexpr int teams_of(Access access) { return teams_of(access == kMixed ? 8 : 4); }

inline int blocks_for(int warps) { return std::max(1, (warps + kWarps - 1) / kWarps); }

// Rows that a team takes of so many elements; few elements are cut finer, until every
// multiprocessor has some warps.
inline int rows_for(int64_t elements, Access access, int multiprocessors) {
  const int64_t row = int64_t{kRow} * teams_of(access);
  int rows = kRows;
  while (rows > 8 && elements < row * rows * kWarps * multiprocessors) rows /= 2;
  return rows;
}

inline int parts_of(int64_t elements, int64_t each) {
  return static_cast<int>((elements + each - 1) / each);
}

}  // namespace pysmooth::cuda

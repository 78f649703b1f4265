// Rows: norms of parameter and gradient per slice along the first dimension, and the coefficients
// that adaptive gradient clipping makes of them.
//
// Both tensors are walked row after row, wherever the first dimension lies, so that a chunk holds
// whole rows and at most two parts. Parts are added in the order of chunks: any number of threads
// gives the same bits.
#pragma once

#include <vector>

#include "core/chunks.h"
#include "core/rows.h"
#include "cpu/kernels.h"

namespace pysmooth {

struct Pipeline;

struct Rows {
  std::vector<size_t> parts_at;     // per chunk: where the sums of its rows begin
  std::vector<double> param, grad;  // sums of squares of every chunk's rows
  std::vector<size_t> coefs_at;     // per slot
  std::vector<double> coefs;        // per row: the coefficient, times what unscales
  std::vector<double> smallest;     // per chunk, of the rows that begin in it: coefficient,
  std::vector<double> squares;      // and sum of squares after the clip

  bool any() const { return !coefs.empty(); }
};

// Makes room, once the chunks are cut.
void size_rows(Pipeline* p);

// The sums of a chunk. Returns their total, of the gradient.
Partial reduce_rows(Pipeline* p, const RowsFn* table, int64_t chunk);

// The coefficients of the rows that begin in a chunk, once all sums are there.
void finish_rows(Pipeline* p, int64_t chunk);

// What the chunks of a slot left behind: the smallest coefficient, the sum of squares.
double smallest_coef(const Pipeline& p, int64_t slot);
double clipped_squares(const Pipeline& p, int64_t slot);

}  // namespace pysmooth

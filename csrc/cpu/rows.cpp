#include "cpu/rows.h"

#include <cmath>

#include "cpu/run.h"

namespace pysmooth {
namespace {

const Slot& slot_of(const Pipeline& p, const Chunk& chunk) {
  return p.slots[static_cast<size_t>(chunk.tensor)];
}

template <class Body>
void each_chunk(const Pipeline& p, int64_t slot, Body body) {
  for (int64_t i = p.chunks.first(slot); i < p.chunks.first(slot + 1); ++i)
    body(static_cast<size_t>(i));
}

}  // namespace

void size_rows(Pipeline* p) {
  Rows& r = p->rows;
  const auto chunks = static_cast<size_t>(p->chunks.size());
  size_t rows = 0, parts = 0;
  r.coefs_at.assign(p->slots.size(), 0);
  for (size_t t = 0; t < p->slots.size(); ++t) {
    const Slot& slot = p->slots[t];
    if (slot.rows == nullptr || slot.numel == 0) continue;
    r.coefs_at[t] = rows;
    rows += static_cast<size_t>(slot.rows->rows);
  }
  r.coefs.assign(rows, 1.0);
  if (rows == 0) return;
  r.parts_at.assign(chunks, 0);
  for (size_t i = 0; i < chunks; ++i) {
    const Chunk& chunk = p->chunks[static_cast<int64_t>(i)];
    const RowShape* shape = slot_of(*p, chunk).rows;
    r.parts_at[i] = parts;
    if (shape == nullptr) continue;
    const int64_t last = (chunk.begin + chunk.length - 1) / shape->length;
    parts += static_cast<size_t>(last - chunk.begin / shape->length + 1);
  }
  r.param.assign(parts, 0.0);
  r.grad.assign(parts, 0.0);
  r.smallest.assign(chunks, 1.0);
  r.squares.assign(chunks, 0.0);
}

Partial reduce_rows(Pipeline* p, const RowsFn* table, int64_t i) {
  const Chunk& chunk = p->chunks[i];
  const Slot& slot = slot_of(*p, chunk);
  const RowShape& shape = *slot.rows;
  const size_t at = p->rows.parts_at[static_cast<size_t>(i)];
  const auto sums = [&](const void* data, DType dtype, const Layout* layout, double* out) {
    const ReduceArgs args{data, layout, chunk.begin, chunk.length, 2.0};
    return table[static_cast<int>(dtype)](args, shape.length, out);
  };
  sums(shape.param, shape.param_dtype, shape.param_layout, &p->rows.param[at]);
  return sums(slot.grad, slot.grad_dtype, shape.grad_layout, &p->rows.grad[at]);
}

void finish_rows(Pipeline* p, int64_t i) {
  Rows& r = p->rows;
  const Chunk& chunk = p->chunks[i];
  const Slot& slot = slot_of(*p, chunk);
  if (!slot.active || slot.rows == nullptr) return;
  const Clip& clip = p->groups[static_cast<size_t>(slot.group)].clip;
  const int64_t length = slot.rows->length, first = chunk.begin / length;
  const int64_t end = chunk.begin + chunk.length;
  const size_t parts = r.parts_at[static_cast<size_t>(i)];
  double* const coefs = &r.coefs[r.coefs_at[static_cast<size_t>(chunk.tensor)]];
  double smallest = 1.0, squares = 0.0;
  for (int64_t row = (chunk.begin + length - 1) / length; row * length < end; ++row) {
    const size_t at = parts + static_cast<size_t>(row - first);
    double param = r.param[at], grad = r.grad[at];
    // A row that goes on comes first in the chunks that follow.
    for (int64_t j = i + 1; (row + 1) * length > end && j < p->chunks.first(chunk.tensor + 1) &&
                            p->chunks[j].begin < (row + 1) * length;
         ++j) {
      param += r.param[r.parts_at[static_cast<size_t>(j)]];
      grad += r.grad[r.parts_at[static_cast<size_t>(j)]];
    }
    const double coef = agc_coefficient(clip, std::sqrt(param), std::sqrt(grad) * p->unscale);
    const double factor = coef * p->unscale;
    coefs[row] = factor;
    squares += factor * factor * grad;
    if (coef < smallest || coef != coef) smallest = coef;
  }
  r.smallest[static_cast<size_t>(i)] = smallest;
  r.squares[static_cast<size_t>(i)] = squares;
}

double smallest_coef(const Pipeline& p, int64_t slot) {
  double out = 1.0;
  each_chunk(p, slot, [&](size_t i) {
    const double coef = p.rows.smallest[i];
    if (coef < out || coef != coef) out = coef;
  });
  return out;
}

double clipped_squares(const Pipeline& p, int64_t slot) {
  double out = 0.0;
  each_chunk(p, slot, [&](size_t i) { out += p.rows.squares[i]; });
  return out;
}

}  // namespace pysmooth

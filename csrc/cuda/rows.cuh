// reduce, for clips by rows: norms of parameter and gradient per row, and a coefficient for each.
//
// Both tensors are walked row after row, wherever the first dimension lies, so that a chunk holds
// whole rows and at most two parts. A warp takes a chunk, and leaves a number per run of its parts:
// part of row r in chunk c has the place r + c, so that a row's parts lie one after another, and so
// do a chunk's. All that is added up then is added up in the CPU backend's order (cpu/rows.cpp).
#pragma once

#include "cuda/access.cuh"
#include "cuda/reduce.cuh"

PYSMOOTH_KERNELS_BEGIN

// A chunk of a tensor: its elements, and the rows that have a part in it or begin in it.
struct RowChunk {
  int64_t number, begin, end, first_part, parts, first_row, end_row;
  PYSMOOTH_DEVICE RowChunk(const RowCut& cut, int64_t numel, int part)
      : number(part), begin(number * kChunk), end(begin + kChunk < numel ? begin + kChunk : numel) {
    first_part = begin / cut.length;
    parts = (end - 1) / cut.length - first_part + 1;
    first_row = (begin + cut.length - 1) / cut.length;
    end_row = (end + cut.length - 1) / cut.length;
  }
};

// Returns whether this thread's team met something that is not finite.
template <class T>
__device__ bool sum_parts(const RowCut& cut, const RowChunk& chunk, const void* from,
                          const Layout* layout, double* sums, double* lanes) {
  constexpr int kGroup = 16 / static_cast<int>(sizeof(T));
  using Us = Team<kGroup>;
  const Us me;
  const auto* const data = static_cast<const T*>(from);
  const int64_t count = chunk.parts * cut.runs;
  bool nonfinite = false;
  for (int64_t first = 0; first < count; first += Us::kTeams) {
    const int64_t i = first + me.team;
    const int64_t row = chunk.first_part + i / cut.runs;
    const int64_t begin = row * cut.length, end = begin + cut.length;
    Run<T> run;
    run.data = data;
    run.layout = layout;
    run.begin = (begin > chunk.begin ? begin : chunk.begin) + i % cut.runs * kFoldElements;
    const int64_t left = (end < chunk.end ? end : chunk.end) - run.begin;
    run.length = left < 0 || i >= count ? 0 : left < kFoldElements ? left : kFoldElements;
    const auto misplaced =
        static_cast<int>(reinterpret_cast<uintptr_t>(data + run.begin) % 16 / sizeof(T));
    run.head = layout != nullptr || misplaced == 0 ? 0 : kGroup - misplaced;
    bool bad = false;
    const double value = reduce_run<Reduction::sum_squares>(run, 2.0, lanes + me.team * kRow, &bad);
    nonfinite = nonfinite || bad;
    if (me.member == 0 && i < count) sums[(chunk.first_part + chunk.number) * cut.runs + i] = value;
  }
  return nonfinite;
}

PYSMOOTH_KERNEL row_sums(View plan, Work work) {
  PYSMOOTH_SHARED(Lanes, lanes);
  double* const mine = lanes[warp_id()][0];
  const Item item = item_of(plan, work);
  if (item.tensor < 0) return;
  const Entry& e = plan.entries[item.tensor];
  const RowCut& cut = plan.cuts[e.cut];
  const RowChunk chunk(cut, e.numel, item.part);
  const auto sum = [&](const void* data, uint8_t dtype, int32_t at, double* sums) {
    const Layout* const layout = at < 0 ? nullptr : plan.layouts + at;
    switch (static_cast<DType>(dtype)) {
      case DType::f32:
        return sum_parts<float>(cut, chunk, data, layout, sums, mine);
      case DType::f64:
        return sum_parts<double>(cut, chunk, data, layout, sums, mine);
      case DType::bf16:
        return sum_parts<bf16>(cut, chunk, data, layout, sums, mine);
      default:
        return sum_parts<f16>(cut, chunk, data, layout, sums, mine);
    }
  };
  double* const sums = plan.row_sums + cut.first_sum;
  sum(cut.param, cut.param_dtype, cut.param_layout, sums);
  const bool nonfinite =
      sum(plan.grads[item.tensor], e.dtype[1], cut.grad_layout, sums + plan.row_sum_count);
  if (nonfinite) atomicOr(&plan.nonfinite[item.tensor], 1u);
}

// Of the rows that begin in a chunk; what finalize wants to know is left per chunk, and by the last
// warp per tensor.
template <class C>
__device__ void clip_rows(const View& plan, const Item& item, double* room) {
  const Entry& e = plan.entries[item.tensor];
  const RowCut& cut = plan.cuts[e.cut];
  const RowChunk chunk(cut, e.numel, item.part);
  const double unscale = unscale_of(plan);
  const Clip& clip = plan.inputs[e.group].clip;
  const double* const param = plan.row_sums + cut.first_sum;
  const double* const grad = param + plan.row_sum_count;
  auto* const coefs = reinterpret_cast<C*>(plan.row_coefs + cut.first_coef);
  const auto of_parts = [&](const double* sums, int64_t row, int64_t parts) {
    return sum_in_order<Reduction::sum_squares>(sums + (row + chunk.number) * cut.runs,
                                                parts * cut.runs, cut.runs, room);
  };
  const auto of_one = [&](const double* sums, int64_t row) {
    double out = 0.0;
    for (int64_t i = 0; i < cut.runs; ++i) out += sums[(row + chunk.number) * cut.runs + i];
    return out;
  };
  double least = 1.0, clipped = 0.0;
  for (int64_t first = chunk.first_row; first < chunk.end_row; first += kWarp) {
    const int64_t row = first + lane_id(), last = chunk.end_row - 1;
    double param_sq = row <= last ? of_one(param, row) : 0.0;
    double grad_sq = row <= last ? of_one(grad, row) : 0.0;
    const int64_t end = (last + 1) * cut.length;
    if (first + kWarp > last && end > chunk.end) {  // the last one goes on in other chunks
      const int64_t parts = (end - 1) / kChunk - chunk.number + 1;
      const double whole_param = of_parts(param, last, parts);
      const double whole_grad = of_parts(grad, last, parts);
      if (row == last) {
        param_sq = whole_param;
        grad_sq = whole_grad;
      }
    }
    room[lane_id()] = 0.0;
    if (row <= last) {
      const double coef = agc_coefficient(clip, std::sqrt(param_sq), std::sqrt(grad_sq) * unscale);
      const double factor = coef * unscale;
      coefs[row] = static_cast<C>(factor);
      room[lane_id()] = factor * factor * grad_sq;
      least = combined<Reduction::min_abs>(coef, least);
    }
    __syncwarp();
    for (int i = 0; plan.accumulates && i < kWarp; ++i) clipped += room[i];
    __syncwarp();
  }
  room[lane_id()] = least;
  __syncwarp();
  for (int i = 0; i < kWarp; ++i) least = combined<Reduction::min_abs>(least, room[i]);
  __syncwarp();
  const double total = of_parts(grad, chunk.first_part, chunk.parts);
  const int64_t at = cut.first_chunk + chunk.number;
  if (lane_id() == 0) {
    plan.row_total[at] = total;
    plan.row_clipped[at] = clipped;
    plan.row_least[at] = least;
  }
  const int64_t chunks = (e.numel + kChunk - 1) / kChunk;
  if (!last_warp(&plan.arrived[item.tensor], static_cast<uint32_t>(chunks))) return;
  const auto of_chunks = [&](const double* values) { return values + cut.first_chunk; };
  const double sum =
      sum_in_order<Reduction::sum_squares>(of_chunks(plan.row_total), chunks, 1, room);
  const double after =
      sum_in_order<Reduction::sum_squares>(of_chunks(plan.row_clipped), chunks, 1, room);
  const double lowest =
      sum_in_order<Reduction::min_abs>(of_chunks(plan.row_least), chunks, 1, room);
  if (lane_id() != 0) return;
  plan.value[item.tensor] = sum;
  plan.row_clipped[plan.row_chunks + e.cut] = after;
  plan.row_least[plan.row_chunks + e.cut] = lowest;
}

PYSMOOTH_KERNEL row_coefs(View plan, Work work) {
  PYSMOOTH_SHARED(Lanes, lanes);
  double* const mine = lanes[warp_id()][0];
  const Item item = item_of(plan, work);
  if (item.tensor < 0) return;
  if (static_cast<DType>(plan.entries[item.tensor].dtype[0]) == DType::f64)
    clip_rows<double>(plan, item, mine);
  else
    clip_rows<float>(plan, item, mine);
}

PYSMOOTH_KERNELS_END

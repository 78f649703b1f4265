// reduce, on CPU: norms of a chunk of a tensor, folded as cpu/fold.h says.

#include "cpu/fold.h"
#include "cpu/walk.h"

PYSMOOTH_KERNELS_BEGIN

template <Reduction kind, class T>
Partial reduce(const ReduceArgs& a) {
  const T* const data = static_cast<const T*>(a.data);
  Partial total;
  total.value = kind == Reduction::min_abs ? Smallest<double>::kNeutral : 0.0;
  if (a.layout == nullptr) {
    for (int64_t i = 0; i < a.length; i += kBlock)
      combine<kind>(&total,
                    reduce_block<kind>(data + a.begin + i,
                                       a.length - i < kBlock ? a.length - i : kBlock, a.power));
    return total;
  }
  // Strided: gather a block, reduce it like a linear one.
  T block[kBlock];
  int64_t filled = 0;
  const int64_t stride = a.layout->stride[0][a.layout->ndim - 1];
  walk(*a.layout, a.begin, a.length, [&](const int64_t* offset, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      block[filled++] = data[offset[0] + i * stride];
      if (filled == kBlock) {
        combine<kind>(&total, reduce_block<kind>(block, filled, a.power));
        filled = 0;
      }
    }
  });
  if (filled > 0) combine<kind>(&total, reduce_block<kind>(block, filled, a.power));
  return total;
}

template <class T>
Partial reduce_rows(const ReduceArgs& a, int64_t row, double* sums) {
  Partial total;
  int64_t left = row - a.begin % row;
  for (int64_t done = 0; done < a.length; left = row) {
    const int64_t n = left < a.length - done ? left : a.length - done;
    const Partial part =
        reduce<Reduction::sum_squares, T>({a.data, a.layout, a.begin + done, n, 2.0});
    *sums++ = part.value;
    combine<Reduction::sum_squares>(&total, part);
    done += n;
  }
  return total;
}

template <Reduction kind>
void fill(ReduceFn* row) {
  row[static_cast<int>(DType::f32)] = reduce<kind, float>;
  row[static_cast<int>(DType::f64)] = reduce<kind, double>;
  row[static_cast<int>(DType::bf16)] = reduce<kind, bf16>;
  row[static_cast<int>(DType::f16)] = reduce<kind, f16>;
}

KernelTable reduce_table() {
  static ReduceFn functions[kReductions][kDTypes];
  fill<Reduction::sum_squares>(functions[static_cast<int>(Reduction::sum_squares)]);
  fill<Reduction::sum_abs>(functions[static_cast<int>(Reduction::sum_abs)]);
  fill<Reduction::max_abs>(functions[static_cast<int>(Reduction::max_abs)]);
  fill<Reduction::min_abs>(functions[static_cast<int>(Reduction::min_abs)]);
  fill<Reduction::count_nonzero>(functions[static_cast<int>(Reduction::count_nonzero)]);
  fill<Reduction::sum_power>(functions[static_cast<int>(Reduction::sum_power)]);
  // In the order of DType.
  static const RowsFn rows[kDTypes] = {reduce_rows<float>, reduce_rows<double>, reduce_rows<bf16>,
                                       reduce_rows<f16>};
  KernelTable table{};
  table.reduce = functions;
  table.reduce_rows = rows;
  return table;
}

PYSMOOTH_KERNELS_END

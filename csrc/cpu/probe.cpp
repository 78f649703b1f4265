// Bandwidth probes: the least a pass over given streams can cost, with next to no arithmetic.
// The benchmark holds every kernel's time against the probe with the same streams.

#include "cpu/kernels.h"
#include "cpu/vec.h"

PYSMOOTH_KERNELS_BEGIN

// kRw streams are read and written, kR only read. Returns something that depends on every read, so
// that the compiler keeps them.
template <int kRw, int kR>
double probe(const ProbeArgs& a) {
  constexpr int W = lanes_of<float>;
  constexpr int kUnroll = 4;
  using io = vector_io<float>;
  vec<float> acc[kUnroll] = {};
  for (int64_t i = a.begin; i + W * kUnroll <= a.begin + a.length; i += W * kUnroll) {
    for (int k = 0; kRw == 0 && k < kR; ++k)
      for (int b = 0; b < W * kUnroll * 4; b += 64)
        prefetch_ahead(reinterpret_cast<const char*>(a.r[k] + i) + b);
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = i + u * W;
      vec<float> x{};
      for (int k = 0; k < kR; ++k) x = x + io::load(a.r[k] + at);
      for (int k = 0; k < kRw; ++k) io::store(a.rw[k] + at, io::load(a.rw[k] + at) + x * 1e-30f);
      if constexpr (kRw == 0) acc[u] = acc[u] + x;
    }
  }
  double sum = 0.0;
  for (int u = 0; u < kUnroll; ++u)
    for (int w = 0; w < W; ++w) sum += static_cast<double>(acc[u][w]);
  return sum;
}

KernelTable probe_table() {
  static const ProbeFn functions[4][3] = {{nullptr, probe<0, 1>, probe<0, 2>},
                                          {probe<1, 0>, probe<1, 1>, probe<1, 2>},
                                          {probe<2, 0>, probe<2, 1>, probe<2, 2>},
                                          {probe<3, 0>, probe<3, 1>, probe<3, 2>}};
  KernelTable table{};
  table.probe = functions;
  return table;
}

PYSMOOTH_KERNELS_END

// aggregate, on CPU: a block of all clients' vectors in one pass. See cpu/aggregate.h.

#include "cpu/aggregate.h"

#include "cpu/fold.h"

PYSMOOTH_KERNELS_BEGIN

constexpr int kTile = 2048;  // elements summed up at a time: what is under way stays in L1 and L2
constexpr int kAtOnce = 4;   // clients read together
constexpr int kLevels = 21;  // of the tree above them: kMostClients
constexpr int kDotLanes = 32;
static_assert((int64_t{kAtOnce} << (kLevels - 1)) == kMostClients);

// One element, or a vector of them.
template <class V>
struct read_as {
  template <class T>
  PYSMOOTH_HD static V load(const T* p) {
    return vector_io<double>::load(p);
  }
};
template <>
struct read_as<double> {
  template <class T>
  PYSMOOTH_HD static double load(const T* p) {
    return load1<double>(p);
  }
};

template <int kCount, class V, class T>
PYSMOOTH_HD V group(const T* const* x, const double* w, int64_t i) {
  const auto term = [&](int c) { return read_as<V>::load(x[c] + i) * w[c]; };
  V sum = term(0);
  if constexpr (kCount > 1) sum = sum + term(1);
  if constexpr (kCount == 3) sum = sum + term(2);
  if constexpr (kCount == 4) sum = sum + (term(2) + term(3));
  return sum;
}

// Where the next group is read, in elements from its vectors' beginning.
template <class T>
struct Next {
  const T* const* x;
  int64_t begin;
};

// A tile is a page or two of each vector: too little for the CPU to see a stream in it. So the next
// group's lines are asked for while this one's are summed up.
template <class T>
PYSMOOTH_HD void fetch(const Next<T>& next, int64_t i) {
#pragma GCC unroll 4
  for (int c = 0; c < kAtOnce; ++c) {
    // As an integer: the address may lie past the end, where a pointer must not point.
    const auto at =
        reinterpret_cast<uintptr_t>(next.x[c]) + static_cast<uintptr_t>(next.begin + i) * sizeof(T);
    __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
  }
}

template <int kCount, class T>
PYSMOOTH_HD void add_group(const T* const* x, const double* w, int64_t begin, int64_t n,
                           const Next<T>& next, double* out) {
  constexpr int W = lanes_of<double>;
  constexpr int kLine = 64 / static_cast<int>(sizeof(T));
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    if (next.x != nullptr) fetch(next, i);
#pragma GCC unroll 8
    for (int j = 0; j < kLine; j += W)
      vector_io<double>::store(out + i + j, group<kCount, vec<double>>(x, w, begin + i + j));
  }
  for (; i < n; ++i) out[i] = group<kCount, double>(x, w, begin + i);
}

// From the tile of sums that was begun later to the earlier one.
PYSMOOTH_HD void merge(const double* earlier, double* later, int64_t n) {
  for (int64_t i = 0; i < n; ++i) later[i] = earlier[i] + later[i];
}

// A tile of the sum. Levels are a binary counter of groups: level l holds the sum of 2^l of them.
template <class T>
void sum_tile(const Clients& c, int64_t begin, int64_t n, T* out) {
  alignas(64) double levels[kLevels + 1][kTile];
  const T* const* const x = reinterpret_cast<const T* const*>(c.data);
  const auto groups = static_cast<unsigned>(c.count / kAtOnce);
  for (unsigned g = 0; g < groups; ++g) {
    int level = 0;
    while (g >> level & 1u) ++level;
    const Next<T> next =
        g + 1 < groups ? Next<T>{x + (g + 1) * kAtOnce, begin} : Next<T>{x, begin + n};
    add_group<kAtOnce>(x + g * kAtOnce, c.weights + g * kAtOnce, begin, n, next, levels[level]);
    for (int l = 0; l < level; ++l) merge(levels[l], levels[level], n);
  }
  // What is left over goes to the smallest sums first.
  const T* const* const last = x + groups * kAtOnce;
  const double* const w = c.weights + groups * kAtOnce;
  double* sum = levels[kLevels];
  int level = 0;
  switch (c.count % kAtOnce) {
    case 1:
      add_group<1>(last, w, begin, n, Next<T>{}, sum);
      break;
    case 2:
      add_group<2>(last, w, begin, n, Next<T>{}, sum);
      break;
    case 3:
      add_group<3>(last, w, begin, n, Next<T>{}, sum);
      break;
    default:
      while (!(groups >> level & 1u)) ++level;
      sum = levels[level++];
  }
  for (; groups >> level != 0; ++level)
    if (groups >> level & 1u) merge(levels[level], sum, n);
  for (int64_t i = 0; i < n; ++i) out[begin + i] = static_cast<T>(sum[i]);
}

template <class T>
Partial sum_block(const Clients& c, int64_t begin, int64_t n, void* out) {
  T* const to = static_cast<T*>(out);
  for (int64_t i = 0; i < n; i += kTile) sum_tile(c, begin + i, n - i < kTile ? n - i : kTile, to);
  return reduce_block<Reduction::sum_squares>(to + begin, n, 2.0);
}

template <class T>
double dot(const T* x, const T* y, int64_t n) {
  constexpr int W = lanes_of<double>;
  constexpr int kRegisters = kDotLanes / W;
  using io = vector_io<double>;
  alignas(64) double lanes[kDotLanes];
  vec<double> acc[kRegisters] = {};
  int64_t i = 0;
  for (; i + kDotLanes <= n; i += kDotLanes)
#pragma GCC unroll 16
    for (int j = 0; j < kRegisters; ++j)
      acc[j] = acc[j] + io::load(x + i + j * W) * io::load(y + i + j * W);
  for (int j = 0; j < kRegisters; ++j) io::store(lanes + j * W, acc[j]);
  for (int64_t j = 0; i + j < n; ++j)
    lanes[j] = lanes[j] + load1<double>(x + i + j) * load1<double>(y + i + j);
  return combine_lanes<Additive, kDotLanes>(lanes);
}

template <class T>
void dot_block(const Clients& c, int64_t begin, int64_t n, const void* other, double* out) {
  const T* const* const x = reinterpret_cast<const T* const*>(c.data);
  for (int64_t k = 0; k < c.count; ++k)
    out[k] = dot(x[k] + begin, static_cast<const T*>(other) + begin, n);
}

KernelTable aggregate_table() {
  KernelTable table{};
  table.aggregate = {{sum_block<float>, sum_block<double>}, {dot_block<float>, dot_block<double>}};
  return table;
}

PYSMOOTH_KERNELS_END

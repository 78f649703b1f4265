// Folding values into 64 lanes and those into one number, with the CPU backend's bits (cpu/fold.h):
// element i goes to lane i mod 64, in order; the lanes are combined in double, by a fixed tree.
//
// A team of threads folds; each holds kGroup neighbouring lanes. Where the tensor does not start on
// a 16-byte boundary the first elements, up to that boundary, belong to the lanes that the last
// thread's group reaches around the end of the row.
#pragma once

#include "cuda/device.cuh"

PYSMOOTH_KERNELS_BEGIN

template <class C>
struct float_bits;
template <>
struct float_bits<float> {
  using type = uint32_t;
  static constexpr uint32_t kMagnitude = 0x7fffffffu;
};
template <>
struct float_bits<double> {
  using type = uint64_t;
  static constexpr uint64_t kMagnitude = 0x7fffffffffffffffu;
};

// Magnitudes as integers: NaN lies above infinity, so a maximum never loses one.
template <class C>
PYSMOOTH_DEVICE typename float_bits<C>::type magnitude_bits(C x) {
  return bits_as<typename float_bits<C>::type>(x) & float_bits<C>::kMagnitude;
}
template <class C>
PYSMOOTH_DEVICE C absolute(C x) {
  return bits_as<C>(magnitude_bits(x));
}

template <Reduction kind>
PYSMOOTH_DEVICE double neutral() {
  return kind == Reduction::min_abs ? __builtin_inf() : 0.0;
}

template <Reduction kind, class C>
PYSMOOTH_DEVICE C fold_in(C acc, C x) {
  if constexpr (kind == Reduction::sum_squares) return acc + x * x;
  if constexpr (kind == Reduction::sum_abs) return acc + absolute(x);
  if constexpr (kind == Reduction::count_nonzero) return acc + (x != C(0) ? C(1) : C(0));
  const C a = absolute(x);
  if constexpr (kind == Reduction::max_abs)
    return magnitude_bits(a) > magnitude_bits(acc) ? a : acc;
  return a != a || a < acc ? a : acc;
}

template <Reduction kind>
PYSMOOTH_DEVICE double combined(double a, double b) {
  if constexpr (kind == Reduction::max_abs) return a > b || a != a ? a : b;
  if constexpr (kind == Reduction::min_abs) return a < b || a != a ? a : b;
  return a + b;
}

using Lanes = double[kWarps][4][kRow];  // up to 4 teams in a warp

// Who a thread is among those that fold together.
template <int kGroup>
struct Team {
  static constexpr int kMembers = kRow / kGroup;
  static constexpr int kTeams = kWarp / kMembers;  // of a warp
  int team, member;
  PYSMOOTH_DEVICE Team() : team(lane_id() / kMembers), member(lane_id() % kMembers) {}
};

// The tree. All threads of the warp come here, every team with lanes of its own; each member gets
// the result.
template <Reduction kind, int kGroup>
PYSMOOTH_DEVICE double tree(double* lanes) {
  const Team<kGroup> me;
  __syncwarp();
  PYSMOOTH_ROLLED
  for (int half = kRow / 2; half > 0; half /= 2) {
    for (int i = me.member; i < half; i += Team<kGroup>::kMembers)
      lanes[i] = combined<kind>(lanes[i], lanes[i + half]);
    __syncwarp();
  }
  const double out = lanes[0];
  __syncwarp();
  return out;
}

// Place `j` of a group that is kept in registers.
template <int kGroup, class C, class Change>
PYSMOOTH_DEVICE void change_at(C (&group)[kGroup], int place, Change change) {
  PYSMOOTH_UNROLL
  for (int j = 0; j < kGroup; ++j)
    if (j == place) group[j] = change(group[j]);
}

template <Reduction kind, int kGroup, class A>
PYSMOOTH_DEVICE double combine_lanes(const A (&acc)[kGroup], int head, double* lanes) {
  const Team<kGroup> me;
  PYSMOOTH_UNROLL
  for (int j = 0; j < kGroup; ++j)
    lanes[(head + kGroup * me.member + j) % kRow] = static_cast<double>(acc[j]);
  return tree<kind, kGroup>(lanes);
}

PYSMOOTH_KERNELS_END

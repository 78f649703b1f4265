// What an update rule is made of.
//
// A rule is a struct, derived from RuleDefaults, with
//   kName         its name, the same in every backend
//   kHyper        names of its hyper-parameters, in the order they are passed
//   kStates       number of state tensors
//   kReadsGrad    false if it rewrites a single stream in place (Scale)
//   kCountsSteps  true if it depends on how many steps a tensor has seen
//   kAccumulates  true if it accumulates the squared norm of the clipped gradients of a scope unit,
//                 as accumulate() says
//   kSendsSigns   true if apply is handed the signs of pass 0's values in place of the gradient: 1
//                 where at least 0, else -1; the driver keeps them as bits
//   kKeepsScale   true if it wants to know stage[0] of the step before
//   kLowStates    states, as bits, that may be kept in bfloat16
//   kKeepsValue   true if the value of pass 0 is what it leaves in state 0: what is summed up,
//                 selected and sent is then what was stored, however it was rounded
//   derive()      what depends on hyper-parameters and step count alone: once for all tensors
//   Hyper<T>      the constants of one tensor's update, in the compute type
//   prepare<T>()  makes them from the hyper-parameters and the scalars
//   update()      one element, or one vector of elements, in registers
//
// and, for a method whose clip, scale or selection depends on more than the gradient,
//   kStages       number of passes before apply; pass S evaluates source<S>(), which may change
//                 states, and sums its values up as stage_sum() says, over the scope of the pass
//   kSelects      true if the values of pass 0 are selected from: selected() then takes in each
//                 chosen coordinate, and again() gives a value once more after the pass
//   kMarks        of how many passes, from the first on, the values are selected from, and those
//                 that were chosen marked, for passes whose streams say so
//   selects_nothing()   whether the hyper-parameters ask for no selection
//   kScales       of how many passes, from the first on, the sum is a scale of a compressor, which
//   may
//                 be taken per block of elements: compressor<S>() is the one that pass S scales
//   kApplies      false if nothing is left to do for apply
//   kAbsorbs      true if all that pass 0 does with a gradient is to add it to states, so that
//                 again() then gives the pass's value: gradients can be taken in one by one, before
//                 the step
//   kApply, kPass, kSelected, kAgain   the streams that apply, each pass, selected() and again()
//                 touch
//
// and, for a rule that draws random numbers,
//   draw()        what apply and the passes whose streams say so are handed for each element
// The driver of each backend owns loading and storing, dtypes, tails and layouts, and what becomes
// of the gradient before a rule sees it (clip, clamp, sign); a rule never sees a pointer. See
// math/sgd.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/config.h"
#include "core/half.h"

namespace pysmooth {

constexpr int kMaxDerived = 4;
constexpr int kMaxStages = 5;
constexpr int kMaxSelections = 2;

// What a pass before apply adds up over the values of its source.
enum class Sum : int { none = 0, abs = 1, squares = 2 };

// What a pass reads and writes; states as bits.
struct Streams {
  bool reads_param = true, writes_param = true, reads_grad = true;
  unsigned reads_state = ~0u, writes_state = ~0u;
  bool draws = false;  // what draw() says
  unsigned marks = 0;  // selections, as bits, whose marks are read
};
constexpr Streams with_reads(Streams a, Streams b) {
  a.reads_param |= b.reads_param;
  a.reads_grad |= b.reads_grad;
  a.reads_state |= b.reads_state;
  return a;
}

// What is drawn for each element, by seed, step, tensor and element: random bits, as many as the
// compute type has, or a standard normal number, the same float in every compute type.
struct Draw {
  enum Kind : int { none = 0, bits = 1, normal = 2 };
  Kind kind = none;
  uint64_t seed = 0;
};

// A hyper-parameter is a double: seeds come in halves.
PYSMOOTH_HD constexpr Draw draw_of(Draw::Kind kind, double seed_low, double seed_high) {
  return {kind, static_cast<uint64_t>(seed_low) | static_cast<uint64_t>(seed_high) << 32};
}

// What apply is told about a tensor, apart from the hyper-parameters.
struct Scalars {
  double grad_coef = 1.0;       // the clip coefficient, from reduce; negative to ascend
  double clip_value = -1.0;     // bound of the gradient's coordinates; negative or NaN: none
  bool first = false;           // this is the tensor's first step: its states hold nothing yet
  bool zero_nonfinite = false;  // coordinates that are not finite count as 0
  // Of every pass before apply: Sum::abs, divided by the number of elements; the root of
  // Sum::squares.
  double stage[kMaxStages] = {};
  // The accumulated sum of squares of the tensor's scope unit, without and with this step's.
  double norm_sq_before = 0.0, norm_sq = 0.0;
  double mark_scale = 1.0;  // of the values that were selected: more than 1 for unbiased rand-k
  double last_scale = 0.0;  // stage[0] of the step before, for rules that keep it
  double derived[kMaxDerived] = {};
};

}  // namespace pysmooth

PYSMOOTH_KERNELS_BEGIN

struct RuleDefaults {
  static constexpr bool kReadsGrad = true;
  static constexpr bool kCountsSteps = false;
  static constexpr bool kAccumulates = false;
  static constexpr bool kSendsSigns = false;
  static constexpr bool kKeepsScale = false;
  static constexpr unsigned kLowStates = 0;
  static constexpr bool kKeepsValue = false;
  static constexpr int kStages = 0;
  static constexpr bool kSelects = false;
  static constexpr int kMarks = 0;
  static constexpr int kScales = 0;
  static constexpr bool kApplies = true;
  static constexpr bool kAbsorbs = false;
  static constexpr Streams kApply{};
  static constexpr Streams kPass[1] = {};
  static constexpr Streams kSelected{}, kAgain{};
  PYSMOOTH_HD static bool reads_param(const double* /*hyper*/, int /*stage*/) { return true; }
  PYSMOOTH_HD static Sum stage_sum(const double* /*hyper*/, int /*stage*/) { return Sum::none; }
  PYSMOOTH_HD static Draw draw(const double* /*hyper*/) { return {}; }
  PYSMOOTH_HD static bool selects_nothing(const double* /*hyper*/) { return false; }
  PYSMOOTH_HD static double accumulate(const double* /*hyper*/, double norm_sq,
                                       double /*sum_squares*/) {
    return norm_sq;
  }
  PYSMOOTH_HD static void derive(const double* /*hyper*/, double /*step*/, double* /*derived*/) {}
};

// One element of every stream of a rule. V is float, double, or a SIMD vector of them.
template <class V, int kStates>
struct Lane {
  V param;
  V grad;
  V state[kStates > 0 ? kStates : 1];
  V drawn;                   // a number, or bits in the place of one
  V marked[kMaxSelections];  // 1 where it was selected, else 0
};

// The unsigned integer that has a number's bits, and how many of them are digits.
template <class C>
struct word_of;
template <>
struct word_of<float> {
  using type = uint32_t;
  static constexpr int kDigits = 23;
};
template <>
struct word_of<double> {
  using type = uint64_t;
  static constexpr int kDigits = 52;
};

// The few operations that read differently on scalars and on SIMD vectors; backends specialise it.
template <class V>
struct ops {
  using Word = typename word_of<V>::type;
  template <class T>
  PYSMOOTH_HD static T select(bool mask, T yes, T no) {
    return mask ? yes : no;
  }
  PYSMOOTH_HD static V sqrt(V x) { return std::sqrt(x); }
  PYSMOOTH_HD static V floor(V x) { return std::floor(x); }
  PYSMOOTH_HD static Word bits(V x) { return bits_as<Word>(x); }
  PYSMOOTH_HD static V number(Word bits) { return bits_as<V>(bits); }
  // The word as an integer with a sign, rounded.
  PYSMOOTH_HD static V whole(Word x) {
    return static_cast<V>(static_cast<std::make_signed_t<Word>>(x));
  }
};

template <class V>
PYSMOOTH_HD V magnitude_of(V x) {
  return ops<V>::select(x < V{}, -x, x);
}

// NaN passes through, as it does in torch.clamp.
template <class V>
PYSMOOTH_HD V clamp_magnitude(V x, V bound) {
  return ops<V>::select(x > bound, bound, ops<V>::select(x < -bound, -bound, x));
}

// -1, 0 or 1. Zeros keep their sign, NaN passes through.
template <class V>
PYSMOOTH_HD V sign_of(V x) {
  const V one = V{} + 1;
  return ops<V>::select(x > V{}, one, ops<V>::select(x < V{}, -one, x));
}

// What becomes of a gradient before its rule sees it.
template <class T>
struct GradientIn {
  T coef, bound;
  bool clamp, zero;

  PYSMOOTH_HD explicit GradientIn(const Scalars& s)
      : coef(static_cast<T>(s.grad_coef)),
        bound(static_cast<T>(s.clip_value)),
        clamp(s.clip_value >= 0.0),
        zero(s.zero_nonfinite) {}

  template <class V>
  PYSMOOTH_HD V operator()(V grad) const {
    // The difference is 0 for finite numbers, NaN for all others.
    // NOLINTNEXTLINE(misc-redundant-expression)
    if (zero) grad = ops<V>::select(grad - grad == V{}, grad, V{});
    const V g = grad * coef;
    return clamp ? clamp_magnitude<V>(g, V{} + bound) : g;
  }
};

template <class... Rules>
struct RuleList {};

PYSMOOTH_KERNELS_END

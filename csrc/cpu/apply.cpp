// apply, on CPU: one pass over parameter, gradient and states with a rule's update.
//
// Linear tensors go through SIMD vectors; the tail of a chunk goes through the same functor,
// element by element, and IEEE arithmetic without contraction makes the two agree to the bit.

#include "core/rules.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"
#include "cpu/walk.h"

PYSMOOTH_KERNELS_BEGIN

template <class Rule, class P, class G>
struct Apply {
  using C = compute_t<P>;
  using H = typename Rule::template Hyper<C>;
  static constexpr int kStates = Rule::kStates;
  static constexpr Streams kUse = Rule::kApply;
  static constexpr bool kTakesGrad = Rule::kReadsGrad && kUse.reads_grad;

  static P* param(const ApplyArgs& a) { return static_cast<P*>(a.param); }
  static const G* grad(const ApplyArgs& a) { return static_cast<const G*>(a.grad); }
  static C* state(const ApplyArgs& a, int k) { return static_cast<C*>(a.state[k]); }

  // Element i of a run that starts at `at` and has the given strides.
  PYSMOOTH_HD static void element(const ApplyArgs& a, const H& h, const GradientIn<C>& take,
                                  const int64_t* at, const int64_t* stride, int64_t i) {
    Lane<C, kStates> x{};
    P* const p = param(a) + at[0] + i * stride[0];
    x.param = load1<C>(p);
    if constexpr (kTakesGrad) x.grad = take(load1<C>(grad(a) + at[1] + i * stride[1]));
    for (int k = 0; k < kStates; ++k)
      if (kUse.reads_state >> k & 1u) x.state[k] = state(a, k)[at[2 + k] + i * stride[2 + k]];
    Rule::update(x, h);
    store1(p, x.param);
    for (int k = 0; k < kStates; ++k)
      if (kUse.writes_state >> k & 1u) state(a, k)[at[2 + k] + i * stride[2 + k]] = x.state[k];
  }

  PYSMOOTH_HD static void contiguous(const ApplyArgs& a, const H& h, const GradientIn<C>& take,
                                     const int64_t* at, int64_t count) {
    using io = vector_io<C>;
    constexpr int W = lanes_of<C>;
    P* const p = param(a) + at[0];
    [[maybe_unused]] const G* const g = kTakesGrad ? grad(a) + at[1] : nullptr;
    int64_t i = 0;
    for (; i + W <= count; i += W) {
      Lane<vec<C>, kStates> x{};
      x.param = io::load(p + i);
      if constexpr (kTakesGrad) x.grad = take(io::load(g + i));
      for (int k = 0; k < kStates; ++k)
        if (kUse.reads_state >> k & 1u) x.state[k] = io::load(state(a, k) + at[2 + k] + i);
      Rule::update(x, h);
      io::store(p + i, x.param);
      for (int k = 0; k < kStates; ++k)
        if (kUse.writes_state >> k & 1u) io::store(state(a, k) + at[2 + k] + i, x.state[k]);
    }
    constexpr int64_t unit[kMaxOperands] = {1, 1, 1, 1, 1, 1};
    for (; i < count; ++i) element(a, h, take, at, unit, i);
  }

  static void run(const ApplyArgs& a) {
    const H h = Rule::template prepare<C>(a.hyper, a.scalars);
    const GradientIn<C> take(a.scalars);
    if (a.layout == nullptr) {
      const int64_t at[kMaxOperands] = {a.begin, a.begin, a.begin, a.begin, a.begin, a.begin};
      return contiguous(a, h, take, at, a.length);
    }
    // The layout holds parameter, gradient (if read), states; operands are numbered with a gap.
    const Layout& layout = *a.layout;
    const int inner = layout.ndim - 1;
    constexpr int kGap = Rule::kReadsGrad ? 0 : 1;
    int64_t stride[kMaxOperands] = {};
    bool unit = true;
    for (int k = 0; k < layout.operands; ++k) {
      stride[k == 0 ? 0 : k + kGap] = layout.stride[k][inner];
      unit = unit && layout.stride[k][inner] == 1;
    }
    walk(layout, a.begin, a.length, [&](const int64_t* offset, int64_t count) {
      int64_t at[kMaxOperands] = {};
      for (int k = 0; k < layout.operands; ++k) at[k == 0 ? 0 : k + kGap] = offset[k];
      if (unit) return contiguous(a, h, take, at, count);
      for (int64_t i = 0; i < count; ++i) element(a, h, take, at, stride, i);
    });
  }
};

// The pairs of dtypes that people train with: gradients like the parameter, or float32, or bfloat16
// (`grad_dtype`) or float16 beside float32 parameters.
template <class Rule>
RuleInfo describe() {
  RuleInfo info{};
  info.name = Rule::kName;
  info.states = Rule::kStates;
  info.reads_grad = Rule::kReadsGrad;
  info.counts_steps = Rule::kCountsSteps;
  info.derive = Rule::derive;
  for (const char* name : Rule::kHyper) info.hyper[info.hypers++] = name;
  info.stages = Rule::kStages;
  info.selects = Rule::kSelects;
  info.applies = Rule::kApplies;
  info.stage_sum = Rule::stage_sum;
  info.reads_param = Rule::reads_param;
  info.selects_nothing = Rule::selects_nothing;
  const auto at = [&info](DType p, DType g) -> ApplyFn& {
    return info.apply[static_cast<int>(p)][static_cast<int>(g)];
  };
  at(DType::f32, DType::f32) = Apply<Rule, float, float>::run;
  at(DType::f64, DType::f64) = Apply<Rule, double, double>::run;
  at(DType::bf16, DType::bf16) = Apply<Rule, bf16, bf16>::run;
  at(DType::f16, DType::f16) = Apply<Rule, f16, f16>::run;
  if constexpr (Rule::kReadsGrad) {
    at(DType::f32, DType::bf16) = Apply<Rule, float, bf16>::run;
    at(DType::f32, DType::f16) = Apply<Rule, float, f16>::run;
  }
  if constexpr (Rule::kReadsGrad && Rule::kStages == 0) {
    at(DType::bf16, DType::f32) = Apply<Rule, bf16, float>::run;
    at(DType::f16, DType::f32) = Apply<Rule, f16, float>::run;
    at(DType::f64, DType::f32) = Apply<Rule, double, float>::run;
  }
  return info;
}

template <class... R>
constexpr int count(RuleList<R...>) {
  return sizeof...(R);
}
template <class... R>
const RuleInfo* describe_all(RuleList<R...>) {
  static const RuleInfo infos[] = {describe<R>()...};
  return infos;
}

KernelTable apply_table() {
  KernelTable table{};
  table.rules = describe_all(Rules{});
  table.rule_count = count(Rules{});
  return table;
}

PYSMOOTH_KERNELS_END

// apply, on CPU: one pass over parameter, gradient and states with a rule's update.

#include "core/rules.h"
#include "cpu/port.h"

PYSMOOTH_KERNELS_BEGIN

// States in bfloat16 beside float32 parameters and gradients: converted in registers, because the
// whole point is speed. Takes whole vectors of a linear chunk; returns how many elements that were.
// The arithmetic, and the noise, are those of staging.
template <class Rule>
int64_t apply_low(const ApplyArgs& a) {
  constexpr unsigned kLow = Rule::kLowStates;
  constexpr int W = kFloats;
  using io = vector_io<float>;
  bool fits = a.stochastic == kLow << 2 && a.layout == nullptr && a.companion == 0 &&
              a.rows.coefs == nullptr;
  for (int k = 0; k < 2 + Rule::kStates; ++k)
    fits = fits && (has(kLow << 2, k) || a.dtype[k] == DType::f32);
  if (!fits) return 0;
  const auto h = Rule::template prepare<float>(a.hyper, a.scalars);
  const GradientIn<float> take(a.scalars);
  float* const p = static_cast<float*>(a.param) + a.begin;
  const float* const g = static_cast<const float*>(a.grad) + a.begin;
  void* state[Rule::kStates];
  for (int k = 0; k < Rule::kStates; ++k)
    state[k] = static_cast<char*>(a.state[k]) + a.begin * itemsize(a.dtype[2 + k]);
  vu32 place = noise_places(static_cast<uint32_t>(a.begin));
  const NoiseKey key = a.noise;
  int64_t i = 0;
  for (; i + W <= a.length; i += W) {
    Lane<vec<float>, Rule::kStates> x{};
    x.param = io::load(p + i);
    x.grad = take(io::load(g + i));
    for (int k = 0; k < Rule::kStates; ++k)
      x.state[k] = has(kLow, k) ? io::load(static_cast<const bf16*>(state[k]) + i)
                                : io::load(static_cast<const float*>(state[k]) + i);
    Rule::update(x, h);
    io::store(p + i, x.param);
    const vu32 random = noise(place, key);
    for (int k = 0; k < Rule::kStates; ++k) {
      const int shift = noise_shift(turn_of(kLow, k));
      if (has(kLow, k))
        store_noisy(static_cast<bf16*>(state[k]) + i, x.state[k], (random >> shift) & 0xffffu);
      else
        io::store(static_cast<float*>(state[k]) + i, x.state[k]);
    }
    place += kNoiseStride * W;
  }
  return i;
}

template <class Rule, class C>
void apply(const ApplyArgs& args) {
  using Use = UseApply<Rule>;
  ApplyArgs a = args;
  if constexpr (Rule::kLowStates != 0 && Rule::kStages == 0 && sizeof(C) == 4) {
    static_assert(Rule::kLowStates < 4u, "one word of noise serves two states");
    const int64_t done = a.stochastic != 0 ? apply_low<Rule>(a) : 0;
    a.begin += done;
    a.length -= done;
  }
  const auto h = Rule::template prepare<C>(a.hyper, a.scalars);
  Drawing<C, Use::kStreams.draws> drawing(a, Rule::draw(a.hyper));
  Staging<C> run(a, touch_of<Rule>(Use::kStreams), drawing.most(Staging<C>::kNoLimit));
  [[maybe_unused]] int64_t done = 0;
  while (run.next()) {
    const Port<Rule, C> port(run.operand, a.scalars, drawing.next(run.count));
    for (int64_t i = 0; i < run.count; i += lanes_of<C>) {
      auto x = port.template load<Use>(i);
      if constexpr (Rule::kSendsSigns) x.grad = load_signs<C>(a.signs, done + i);
      Rule::update(x, h);
      port.template store<Use>(x, i);
    }
    run.commit();
    done += run.count;
  }
}

template <class Rule>
RuleInfo describe() {
  static_assert(Rule::kStates < kMaxStates, "room for the parameter's companion");
  RuleInfo info{};
  info.name = Rule::kName;
  info.states = Rule::kStates;
  info.reads_grad = Rule::kReadsGrad;
  info.counts_steps = Rule::kCountsSteps;
  info.low_states = Rule::kLowStates;
  info.sends_signs = Rule::kSendsSigns;
  info.keeps_scale = Rule::kKeepsScale;
  info.accumulates = Rule::kAccumulates;
  info.accumulate = Rule::accumulate;
  info.derive = Rule::derive;
  for (const char* name : Rule::kHyper) info.hyper[info.hypers++] = name;
  info.stages = Rule::kStages;
  info.selects = Rule::kSelects;
  info.applies = Rule::kApplies;
  info.stage_sum = Rule::stage_sum;
  info.reads_param = Rule::reads_param;
  info.selects_nothing = Rule::selects_nothing;
  if constexpr (Rule::kApplies) {
    info.apply[kFloat] = apply<Rule, float>;
    info.apply[kDouble] = apply<Rule, double>;
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

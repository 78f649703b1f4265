// Every update rule as a device function: the math headers must stay compilable by nvcc.

#include "core/rules.h"

namespace pysmooth::generic {

template <class Rule, int kStage = 0, class X, class H>
__device__ void passes(X& x, const H& h) {
  if constexpr (kStage < Rule::kStages) {
    x.grad += Rule::template source<kStage>(x, h);
    passes<Rule, kStage + 1>(x, h);
  }
}

template <class Rule>
__device__ void one(float* param, const float* grad, float* state, const double* hyper) {
  const auto h = Rule::template prepare<float>(hyper, Scalars{});
  Lane<float, Rule::kStates> x{};
  x.param = *param;
  x.grad = GradientIn<float>(Scalars{})(*grad);
  for (int k = 0; k < Rule::kStates; ++k) x.state[k] = state[k];
  passes<Rule>(x, h);
  if constexpr (Rule::kSelects) Rule::selected(x, Rule::template again<0>(x, h), h);
  Rule::update(x, h);
  *param = x.param;
  for (int k = 0; k < Rule::kStates; ++k) state[k] = x.state[k];
}

template <class... R>
__device__ void all(RuleList<R...>, float* p, const float* g, float* s, const double* h) {
  (one<R>(p, g, s, h), ...);
}

__global__ void rules(float* p, const float* g, float* s, const double* h) {
  all(Rules{}, p, g, s, h);
}

}  // namespace pysmooth::generic

// From the sums of tensors to norms and clip coefficients: the last block of reduce, in the order
// that the CPU backend adds things up in.
#pragma once

#include "core/chunks.h"
#include "cuda/fold.cuh"

PYSMOOTH_KERNELS_BEGIN

constexpr int kChunkElements = static_cast<int>(kChunk);

PYSMOOTH_DEVICE bool is_active(const View& plan, int t) {
  return plan.grads[t] != nullptr && plan.entries[t].numel > 0;
}

// Whether a tensor's sums count: an empty part of a larger one has the sums of the others.
PYSMOOTH_DEVICE bool is_counted(const View& plan, int t) {
  const Entry& e = plan.entries[t];
  return is_active(plan, t) || (e.numel == 0 && e.counted != 0);
}

// Whether a tensor lies on this device; if not, what its device has told of it.
PYSMOOTH_DEVICE bool is_mine(const View& plan, int t) {
  return plan.board == nullptr || plan.entries[t].site == plan.site;
}
PYSMOOTH_DEVICE const Shared& told_of(const View& plan, int t) {
  return plan.board[int64_t{plan.entries[t].site} * plan.tensors + t];
}

// What gradients are multiplied by. The loss scale's reciprocal is rounded as GradScaler does it.
PYSMOOTH_DEVICE double unscale_of(const View& plan) {
  const StepInput& step = *plan.step;
  if (step.grad_scale == nullptr) return step.unscale;
  return step.unscale *
         static_cast<double>(static_cast<float>(1.0 / static_cast<double>(*step.grad_scale)));
}

// Whether GradScaler found that the loss scale was too large: then nothing happens in this step.
PYSMOOTH_DEVICE bool overflowed(const View& plan) {
  const float* const found = plan.step->found_inf;
  return found != nullptr && *found != 0.0f;
}

// Combines the numbers of `runs` runs, a chunk's first (block by block, where a block has several),
// then those of the chunks, in order. One warp; `room` holds 256 numbers. Every lane gets the
// result.
template <Reduction kind>
__device__ double sum_in_order(const double* partial, int64_t runs, int per_chunk, double* room,
                               int per_block = 1) {
  constexpr int kChunks = 128;
  const int64_t chunks = (runs + per_chunk - 1) / per_chunk;
  double total = neutral<kind>();
  for (int64_t first = 0; first < chunks; first += kChunks) {
    PYSMOOTH_UNROLL
    for (int u = 0; u < kChunks; u += kWarp) {
      const int64_t begin = (first + u + lane_id()) * per_chunk;
      double value = neutral<kind>();
      for (int64_t i = begin; i < begin + per_chunk && i < runs;) {
        double block = partial[i++];
        for (int j = 1; j < per_block && i < runs; ++j) block = combined<kind>(block, partial[i++]);
        value = combined<kind>(value, block);
      }
      room[u + lane_id()] = value;
    }
    __syncwarp();
    const int64_t left = chunks - first;
    const int n = left < kChunks ? static_cast<int>(left) : kChunks;
    for (int i = 0; i < n; ++i) total = combined<kind>(total, room[i]);
    __syncwarp();
  }
  return total;
}

// Which numbers go together: one thread adds up one unit.
struct Units {
  Scope scope;
  int count;
  PYSMOOTH_DEVICE Units(const View& plan, Scope scope_)
      : scope(scope_),
        count(scope == Scope::global  ? 1
              : scope == Scope::group ? plan.groups
                                      : plan.tensors) {}
  PYSMOOTH_DEVICE int of(const View& plan, int t) const {
    return scope == Scope::global ? 0 : scope == Scope::group ? plan.entries[t].group : t;
  }
  PYSMOOTH_DEVICE int first(const View& plan, int u) const {
    return scope == Scope::global ? 0 : scope == Scope::group ? plan.group_first[u] : u;
  }
  PYSMOOTH_DEVICE int last(const View& plan, int u) const {
    return scope == Scope::global  ? plan.tensors
           : scope == Scope::group ? plan.group_first[u + 1]
                                   : u + 1;
  }
};

struct Staged {
  double value[kThreads];
  int32_t counts[kThreads];
};

// For each unit u: finish(u, total, any), total being add(total, value(t)) over its tensors with
// counts(t), in order. A whole block.
template <class Counts, class Value, class Add, class Finish>
PYSMOOTH_DEVICE void each_unit(const View& plan, const Units& units, double neutral, Counts counts,
                               Value value, Add add, Finish finish) {
  PYSMOOTH_SHARED(Staged, staged);
  const int me = static_cast<int>(threadIdx.x);
  for (int batch = 0; batch < units.count; batch += kThreads) {
    const int u = batch + me;
    const bool mine = u < units.count;
    const int from = units.first(plan, batch);
    const int last = batch + kThreads < units.count ? batch + kThreads : units.count;
    const int to = units.last(plan, last - 1);
    double total = neutral;
    bool any = false;
    for (int base = from; base < to; base += kThreads) {
      __syncthreads();
      if (base + me < to) {
        staged.counts[me] = counts(base + me) ? 1 : 0;
        staged.value[me] = staged.counts[me] != 0 ? value(base + me) : 0.0;
      }
      __syncthreads();
      if (!mine) continue;
      const int begin = units.first(plan, u) > base ? units.first(plan, u) : base;
      const int end = units.last(plan, u) < base + kThreads ? units.last(plan, u) : base + kThreads;
      for (int t = begin; t < end && t < to; ++t)
        if (staged.counts[t - base] != 0) {
          total = add(total, staged.value[t - base]);
          any = true;
        }
    }
    if (mine) finish(u, total, any);
  }
  __syncthreads();
}

template <class Body, class... R>
PYSMOOTH_DEVICE void with_rule(RuleList<R...>, int rule, Body body) {
  int i = 0;
  ((rule == i++ ? body(R{}) : void()), ...);
}

// A group's hyper-parameters: given, or read from where they are.
PYSMOOTH_DEVICE void read_hyper(const GroupInput& in, double* hyper) {
  for (int i = 0; i < kMaxHyper; ++i) {
    const void* const at = in.hyper_at[i];
    if (at == nullptr)
      hyper[i] = in.hyper[i];
    else if ((in.hyper_is_double >> i & 1u) != 0)
      hyper[i] = *static_cast<const double*>(at);
    else
      hyper[i] = static_cast<double>(*static_cast<const float*>(at));
  }
}

// The squared norms that rules accumulate: see the CPU backend's run.cpp. First, those of this step
// after the clip, per unit; negative where nobody has a gradient.
PYSMOOTH_DEVICE void sum_clipped(const View& plan, double unscale) {
  each_unit(
      plan, Units(plan, plan.scope), 0.0,
      [&](int t) { return plan.entries[t].norm_sq != nullptr && is_counted(plan, t); },
      [&](int t) {
        if (plan.entries[t].cut >= 0)
          return plan.row_clipped[plan.row_chunks + plan.entries[t].cut];
        const double coef = plan.coefs[t] * unscale;
        return coef * coef * plan.value[t];
      },
      [](double total, double x) { return total + x; },
      [&](int u, double total, bool any) { plan.unit_sum[u] = any ? total : -1.0; });
}

// Written are the numbers before and after this step; whether they are kept is not known yet.
PYSMOOTH_DEVICE void accumulate_norms(const View& plan) {
  const Units units(plan, plan.scope);
  const auto keeps = [&](int t) { return plan.entries[t].norm_sq != nullptr; };
  for (int t = static_cast<int>(threadIdx.x); t < plan.tensors; t += kThreads) {
    if (!keeps(t)) continue;
    const Entry& e = plan.entries[t];
    int from = t;  // one that just joined takes the number of a member that was there
    if (plan.started[t] == 0 && plan.scope != Scope::tensor)
      for (int v = plan.group_first[e.group + 1] - 1; v >= plan.group_first[e.group]; --v)
        if (keeps(v) && plan.started[v] != 0) {
          from = v;
          break;
        }
    const double held =
        is_mine(plan, from) ? *plan.entries[from].norm_sq : told_of(plan, from).norm_sq;
    const double sum = plan.unit_sum[units.of(plan, t)];
    double hyper[kMaxHyper];
    read_hyper(plan.inputs[e.group], hyper);
    double after = held;
    if (!(sum < 0.0))
      with_rule(Rules{}, e.rule, [&](auto rule) {
        if constexpr (decltype(rule)::kAccumulates) after = rule.accumulate(hyper, held, sum);
      });
    plan.norm_sq[t] = held;
    plan.norm_sq[plan.tensors + t] = after;
  }
}

// Puts what was found of this step's gradients where it is kept; whether one was not finite. A
// whole block.
PYSMOOTH_DEVICE bool keep_nonfinite(const View& plan) {
  const bool counts = !overflowed(plan);
  PYSMOOTH_SHARED(int, nonfinite);
  if (threadIdx.x == 0) nonfinite = 0;
  __syncthreads();
  for (int t = static_cast<int>(threadIdx.x); t < plan.tensors; t += kThreads) {
    const uint32_t found = plan.nonfinite[t];
    plan.nonfinite[t] = 0;
    plan.nonfinite[plan.tensors + t] = found;
    if (found != 0) atomicOr(&nonfinite, 1);
    if (found != 0 && counts) plan.nonfinite[2 * plan.tensors + t] = 1;
  }
  __syncthreads();
  return nonfinite != 0;
}

// finish(u, total, any) for every scope unit, with what its norm is made of.
template <Reduction kind, class Finish>
PYSMOOTH_DEVICE void total_units(const View& plan, Finish finish) {
  each_unit(
      plan, Units(plan, plan.scope), neutral<kind>(), [&](int t) { return is_counted(plan, t); },
      [&](int t) {
        // torch's total 0-"norm" is the 0-"norm" of the tensors' norms: how many are not zero.
        if (kind == Reduction::count_nonzero && plan.scope != Scope::tensor)
          return plan.value[t] != 0.0 ? 1.0 : 0.0;
        return plan.value[t];
      },
      [](double total, double x) { return combined<kind>(total, x); }, finish);
}

template <Reduction kind>
PYSMOOTH_DEVICE double norm_of(const View& plan, double total) {
  if (kind == Reduction::sum_squares) total = std::sqrt(total);
  if constexpr (kind == Reduction::sum_power) total = std::pow(total, 1.0 / plan.norm_type);
  return kind == Reduction::count_nonzero ? total : total * unscale_of(plan);
}

// From norms to coefficients. A whole block.
PYSMOOTH_DEVICE void clip_by_norms(const View& plan) {
  const Units units(plan, plan.scope);
  for (int t = static_cast<int>(threadIdx.x); t < plan.tensors; t += kThreads) {
    const Entry& e = plan.entries[t];
    plan.coefs[t] =
        !is_counted(plan, t) ? 1.0
        : e.cut >= 0 ? plan.row_least[plan.row_chunks + e.cut]
                     : clip_coefficient(plan.inputs[e.group].clip, plan.norms[units.of(plan, t)]);
  }
  __syncthreads();
}

template <Reduction kind>
__device__ void finalize(const View& plan) {
  const bool nonfinite = keep_nonfinite(plan);
  total_units<kind>(plan, [&](int u, double total, bool any) {
    plan.norms[u] = any ? norm_of<kind>(plan, total) : 0.0;
  });
  clip_by_norms(plan);
  if (threadIdx.x == 0) plan.status->nonfinite = nonfinite ? 1 : 0;
  if (!plan.accumulates) return;
  sum_clipped(plan, unscale_of(plan));
  accumulate_norms(plan);
}

PYSMOOTH_KERNELS_END

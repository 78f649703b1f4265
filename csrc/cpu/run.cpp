// The pipeline of one step. Chunks of all tensors are shared out among the threads; partial results
// are kept per chunk and combined in chunk order by one thread, so the outcome is the same to the
// bit for any number of threads.

#include "cpu/run.h"

#include "cpu/staged.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <utility>

namespace pysmooth {
namespace {

std::atomic<bool> forked{false};

double combine(Reduction kind, double a, double b) {
  if (kind == Reduction::max_abs) return a > b || a != a ? a : b;
  if (kind == Reduction::min_abs) return a < b || a != a ? a : b;
  return a + b;
}

double neutral(Reduction kind) { return kind == Reduction::min_abs ? HUGE_VAL : 0.0; }

double finish(Reduction kind, double norm_type, double value) {
  if (kind == Reduction::sum_squares) return std::sqrt(value);
  if (kind == Reduction::sum_power) return std::pow(value, 1.0 / norm_type);
  return value;
}

void reduce_chunk(Pipeline* p, const KernelTable& table, Reduction kind, int64_t i) {
  const Chunk& chunk = p->chunks[i];
  const Slot& slot = p->slots[static_cast<size_t>(chunk.tensor)];
  if (!slot.active || slot.summed) return;
  Partial& partial = p->partials[static_cast<size_t>(i)];
  if (slot.rows != nullptr) partial = reduce_rows(p, table.reduce_rows, i);
  if (slot.rows != nullptr && kind == Reduction::sum_squares) return;
  partial = reduce_chunk(slot.grad, slot.grad_dtype, slot.grad_layout, chunk, p->norm_type);
}

void apply_chunk(Pipeline* p, const RuleInfo* rules, int64_t i) {
  const Slot& slot = p->slots[static_cast<size_t>(p->chunks[i].tensor)];
  const RuleInfo& rule = rules[slot.rule];
  if (!slot.active || !rule.applies) return;
  if (p->skip_unit_coef && p->coefs[static_cast<size_t>(p->chunks[i].tensor)] == 1.0) return;
  ApplyArgs args = args_of(*p, rule, p->chunks[i]);
  p->staged.hand_bits(i, &args);
  const ApplyFn run = rule.apply[compute_of(slot.param_dtype)];
  if (!p->scales_blocks() || rule.stages == 0) return run(args);
  each_block(*p, i, args, rule.stages, [run](const ApplyArgs& block, size_t) { run(block); });
}

size_t unit_of(const Pipeline& p, size_t t) {
  if (p.scope == Scope::global) return 0;
  return p.scope == Scope::group ? static_cast<size_t>(p.slots[t].group) : t;
}

// The squared norms that rules accumulate, of the clipped gradients of a scope unit's tensors that
// keep one; `squares` are their sums of squares, after the clip. Every such tensor keeps the number
// for itself, with or without a gradient, so that all members of a unit (in a group) agree; one
// that just joined takes it from one that was there. A unit without a gradient has no step.
void accumulate(Pipeline* p, const RuleInfo* rules, const std::vector<double>& squares) {
  const size_t tensors = p->slots.size();
  std::vector<double> sums(p->norms.size(), 0.0);
  std::vector<char> moves(p->norms.size(), 0);
  for (size_t t = 0; t < tensors; ++t) {
    const Slot& slot = p->slots[t];
    if (!slot.active || slot.norm_sq == nullptr) continue;
    sums[unit_of(*p, t)] += squares[t];
    moves[unit_of(*p, t)] = 1;
  }
  if (p->exchange != nullptr) {
    double flag = 0.0;
    p->exchange->units(Reduction::sum_squares, p->scope, &sums, &flag);
    for (size_t u = 0; u < sums.size(); ++u) moves[u] = moves[u] != 0 || sums[u] != 0.0;
  }
  std::vector<const Slot*> veterans(p->groups.size(), nullptr);
  if (p->scope != Scope::tensor)
    for (const Slot& slot : p->slots)
      if (slot.norm_sq != nullptr && !slot.first) veterans[static_cast<size_t>(slot.group)] = &slot;
  p->norm_sq_before.assign(tensors, 0.0);
  p->norm_sq.assign(tensors, 0.0);
  for (size_t t = 0; t < tensors; ++t) {
    const Slot& slot = p->slots[t];
    if (slot.norm_sq == nullptr) continue;
    const auto g = static_cast<size_t>(slot.group);
    const double* const held =
        slot.first && veterans[g] != nullptr ? veterans[g]->norm_sq : slot.norm_sq;
    const size_t u = unit_of(*p, t);
    p->norm_sq_before[t] = *held;
    p->norm_sq[t] =
        moves[u] ? rules[slot.rule].accumulate(p->groups[g].hyper, *held, sums[u]) : *held;
  }
}

// The sum of every tensor's partials, and whether any is not finite.
void sum_up(Pipeline* p, Reduction kind) {
  const auto tensors = p->slots.size();
  p->sums.assign(tensors, neutral(kind));
  p->flags.assign(p->exchange != nullptr ? tensors : 0, 0.0);
  p->nonfinite = false;
  for (size_t t = 0; t < tensors; ++t) {
    if (!p->slots[t].active) continue;
    bool nonfinite = false;
    double value = neutral(kind);
    for (int64_t i = p->chunks.first(static_cast<int64_t>(t));
         i < p->chunks.first(static_cast<int64_t>(t) + 1); ++i) {
      const Partial& partial = p->partials[static_cast<size_t>(i)];
      value = combine(kind, value, partial.value);
      nonfinite = nonfinite || partial.nonfinite;
    }
    p->sums[t] = value;
    p->nonfinite = p->nonfinite || nonfinite;
    if (p->exchange != nullptr) p->flags[t] = nonfinite ? 1.0 : 0.0;
  }
  if (p->exchange == nullptr) return;
  p->exchange->tensors(kind, &p->sums, &p->flags);
  p->nonfinite = std::any_of(p->flags.begin(), p->flags.end(), [](double f) { return f != 0.0; });
}

// Turns the partials into norms and clip coefficients. One thread, fixed order.
void finalize(Pipeline* p, const RuleInfo* rules, Reduction kind) {
  const auto tensors = p->slots.size();
  const size_t units = p->scope == Scope::global  ? 1
                       : p->scope == Scope::group ? p->groups.size()
                                                  : tensors;
  p->norms.assign(units, neutral(kind));
  p->coefs.assign(tensors, 1.0);
  sum_up(p, kind);
  std::vector<char> seen(units, 0);
  std::vector<double> squares(p->accumulates ? tensors : 0, 0.0);
  for (size_t t = 0; t < tensors; ++t) {
    if (!p->slots[t].active) continue;
    double value = p->sums[t];
    // torch's total 0-"norm" is the 0-"norm" of the tensors' norms: how many are not zero.
    if (kind == Reduction::count_nonzero && p->scope != Scope::tensor) value = value != 0.0;
    if (p->accumulates) squares[t] = value;
    double& norm = p->norms[unit_of(*p, t)];
    norm = combine(kind, norm, value);
    seen[unit_of(*p, t)] = 1;
  }
  if (p->exchange != nullptr) {
    double flag = p->nonfinite ? 1.0 : 0.0;
    p->exchange->units(kind, p->scope, &p->norms, &flag);
    p->nonfinite = flag != 0.0;
    for (size_t u = 0; u < units; ++u) seen[u] = seen[u] != 0 || p->norms[u] != neutral(kind);
  }
  for (size_t u = 0; u < units; ++u)
    p->norms[u] = seen[u] ? finish(kind, p->norm_type, p->norms[u]) : 0.0;
  if (kind != Reduction::count_nonzero)
    for (double& norm : p->norms) norm *= p->unscale;
  // Per tensor only where tensors differ: thousands of divisions would show.
  std::vector<double> group_coefs(p->groups.size());
  if (p->scope != Scope::tensor)
    for (size_t g = 0; g < p->groups.size(); ++g)
      group_coefs[g] =
          clip_coefficient(p->groups[g].clip, p->norms[p->scope == Scope::global ? 0 : g]);
  for (size_t t = 0; t < tensors; ++t) {
    if (!p->slots[t].active) continue;
    const auto g = static_cast<size_t>(p->slots[t].group);
    p->coefs[t] = p->slots[t].rows != nullptr ? smallest_coef(*p, static_cast<int64_t>(t))
                  : p->scope == Scope::tensor ? clip_coefficient(p->groups[g].clip, p->norms[t])
                                              : group_coefs[g];
    if (!p->accumulates) continue;
    const double coef = p->coefs[t] * p->unscale;
    squares[t] = p->slots[t].rows != nullptr ? clipped_squares(*p, static_cast<int64_t>(t))
                                             : coef * coef * squares[t];
  }
  if (p->accumulates) accumulate(p, rules, squares);
}

// In blocks, which stay in a core's cache from one kind of question to the next.
constexpr size_t kTensorBlock = 64;

bool gather_alone(Gather* gather) {
  if (!gather->begin()) return false;
  const size_t count = gather->tensors();
  for (size_t t = 0; t < count; t += kTensorBlock) {
    gather->look(t, std::min(t + kTensorBlock, count));
    gather->check(t, std::min(t + kTensorBlock, count));
  }
  return gather->finish();
}

// A team's way through a Gather: blocks of tensors are handed out as threads ask for them, because
// the calling thread comes late, and sleeping ones later.
class Questions {
 public:
  // By all threads, up to Gather::finish.
  void ask(Gather* gather, bool* good) {
#pragma omp master
    *good = gather->begin();
    run(&looked_, gather, [gather](size_t a, size_t b) { gather->look(a, b); });
#pragma omp barrier
    run(&checked_, gather, [gather](size_t a, size_t b) { gather->check(a, b); });
#pragma omp barrier
  }
  void tell(Gather* gather) {
    run(&told_, gather, [gather](size_t a, size_t b) { gather->wrote(a, b); });
  }

 private:
  template <class Body>
  static void run(std::atomic<size_t>* next, const Gather* gather, Body body) {
    const size_t count = gather->tensors();
    for (;;) {
      const size_t begin = next->fetch_add(kTensorBlock, std::memory_order_relaxed);
      if (begin >= count) return;
      body(begin, std::min(begin + kTensorBlock, count));
    }
  }
  std::atomic<size_t> looked_{0}, checked_{0}, told_{0};
};

// Once per group what would otherwise be done for every chunk.
void derive_groups(Pipeline* p, const RuleInfo* rules) {
  for (Group& group : p->groups) group.step = 0.0;
  for (const Slot& slot : p->slots) {
    Group& group = p->groups[static_cast<size_t>(slot.group)];
    if (!slot.active || slot.steps == nullptr || group.step != 0.0) continue;
    group.step = static_cast<double>(*slot.steps) + 1.0;
    rules[slot.rule].derive(group.hyper, group.step, group.derived);
  }
}

}  // namespace

bool needs_reduce(const Pipeline& p) {
  if (p.absorbs) return false;  // absorb() looked
  if (p.always_norm || p.accumulates || asks_first(p.policy)) return true;
  return std::any_of(p.groups.begin(), p.groups.end(),
                     [](const Group& g) { return g.clip.needs_norm(); });
}

ApplyArgs args_of(const Pipeline& p, const RuleInfo& rule, const Chunk& chunk) {
  const auto t = static_cast<size_t>(chunk.tensor);
  const Slot& slot = p.slots[t];
  const Group& group = p.groups[static_cast<size_t>(slot.group)];
  ApplyArgs args;
  double coef = (p.reduced ? p.coefs[t] : 1.0) * p.unscale;
  if (slot.rows != nullptr) {
    coef = 1.0;  // and the rest by rows
    args.rows.coefs = &p.rows.coefs[p.rows.coefs_at[t]];
    args.rows.rows = slot.rows->rows;
    args.rows.run = slot.rows->run;
    args.rows.operand = rule.reads_grad ? 1 : 0;
  }
  args.scalars.grad_coef = group.maximize ? -coef : coef;
  args.scalars.clip_value = group.clip_value;
  args.scalars.first = slot.first;
  args.scalars.zero_nonfinite = p.policy == NonFinite::zero;
  for (int stage = 0; stage < rule.stages; ++stage)
    args.scalars.stage[stage] = p.staged.values[stage][t];
  if (rule.accumulates) {
    args.scalars.norm_sq_before = p.norm_sq_before[t];
    args.scalars.norm_sq = p.norm_sq[t];
  }
  if (rule.marks) args.scalars.mark_scale = p.select.scale_of(slot.numel);
  if (slot.scale != nullptr) args.scalars.last_scale = *slot.scale;
  if (rule.counts_steps) {
    const double step = static_cast<double>(*slot.steps) + 1.0;
    if (step == group.step)
      std::copy_n(group.derived, kMaxDerived, args.scalars.derived);
    else  // a tensor that sat out some steps
      rule.derive(group.hyper, step, args.scalars.derived);
  }
  args.stochastic = 0;
  for (uint64_t*& bits : args.bits) bits = nullptr;
  args.param = slot.param;
  args.grad = slot.grad;
  args.dtype[0] = slot.param_dtype;
  args.dtype[1] = slot.grad_dtype;
  for (int k = 0; k < kMaxStates; ++k) {
    args.state[k] = slot.state[k];
    args.dtype[2 + k] = slot.state_dtype[k];
    if (k < rule.states && slot.state_dtype[k] == DType::bf16) args.stochastic |= 1u << (2 + k);
  }
  args.storage = slot.storage;
  args.companion = has_companion(slot.storage) ? 2 + rule.states : 0;
  if (slot.storage == ParamStorage::master) {  // the rule's parameter is the master
    std::swap(args.param, args.state[rule.states]);
    std::swap(args.dtype[0], args.dtype[args.companion]);
  }
  if (slot.storage == ParamStorage::stochastic) args.stochastic |= 1u;
  args.step = slot.steps == nullptr ? 0u : static_cast<uint32_t>(*slot.steps);
  args.tensor = static_cast<uint32_t>(t);
  if (args.stochastic != 0) args.noise = NoiseKey(args.step, args.tensor);
  args.layout = slot.layout;
  args.begin = chunk.begin;
  args.length = chunk.length;
  args.hyper = group.hyper;
  return args;
}

Partial reduce_chunk(const void* data, DType dtype, const Layout* layout, const Chunk& chunk,
                     double norm_type) {
  const auto kind = static_cast<int>(reduction_of(norm_type));
  return kernels().reduce[kind][static_cast<int>(dtype)](
      {data, layout, chunk.begin, chunk.length, norm_type});
}

int default_threads() { return in_forked_child() ? 1 : omp_get_max_threads(); }

bool in_forked_child() {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
  (void)registered;
  return forked.load(std::memory_order_relaxed);
}

void Pipeline::cut_chunks() {
  chunks.clear();
  for (const Slot& slot : slots) chunks.add(slot.numel);
  partials.assign(static_cast<size_t>(chunks.size()), Partial{});
  size_rows(this);
}

Outcome run_step(Pipeline* p, int threads, Gather* gather) {
  const KernelTable& table = kernels();
  const Reduction kind = reduction_of(p->norm_type);
  p->reduced = needs_reduce(*p);
  p->failed = false;
  threads = in_forked_child() ? 1 : std::max(1, threads);
  const bool many = gather->tensors() >= kManyTensors;
  const auto serial = [&] { return !many && p->chunks.total() < kSerialElements; };
  const bool inside = threads > 1 && !serial();  // gathers while the pool wakes up
  if (!inside && !gather_alone(gather)) return Outcome::stale;
  if (serial()) threads = 1;

  const auto refused = [p] {
    return p->failed || (p->reduced && p->nonfinite && asks_first(p->policy));
  };
  bool gathered = true;
  if (threads == 1) {
    derive_groups(p, table.rules);
    if (p->reduced) {
      for (int64_t i = 0; i < p->chunks.size(); ++i) reduce_chunk(p, table, kind, i);
      for (int64_t i = 0; p->rows.any() && i < p->chunks.size(); ++i) finish_rows(p, i);
      finalize(p, table.rules, kind);
    }
    prepare_stages(p, table, threads);
    if (!refused() && p->staged.stages > 0) {
      Schedule schedule(p->chunks, 1);
      run_stages(p, table, &schedule, 1);
    }
    if (!refused())
      for (int64_t i = 0; i < p->chunks.size(); ++i) apply_chunk(p, table.rules, i);
    if (!refused()) gather->wrote(0, gather->tensors());
  } else {
    std::optional<Schedule> schedule;
    Questions questions;
    // One parallel region for everything. The pool may give fewer threads than asked for, so shares
    // are walked with a stride of the threads that are really there.
#pragma omp parallel num_threads(threads)
    {
      const int team = omp_get_num_threads();
      if (inside && many) questions.ask(gather, &gathered);
#pragma omp master
      {
        if (inside) gathered = many ? gathered && gather->finish() : gather_alone(gather);
        if (gathered) {
          derive_groups(p, table.rules);
          prepare_stages(p, table, threads);
          schedule.emplace(p->chunks, threads);
        }
      }
#pragma omp barrier
      if (gathered) {
        if (p->reduced) {
          for (int share = omp_get_thread_num(); share < threads; share += team)
            schedule->run(share, kReducePass, [&](int64_t i) { reduce_chunk(p, table, kind, i); });
#pragma omp barrier
          if (p->rows.any()) {
            for (int share = omp_get_thread_num(); share < threads; share += team)
              schedule->run(share, kRowsPass, [&](int64_t i) { finish_rows(p, i); });
#pragma omp barrier
          }
#pragma omp master
          finalize(p, table.rules, kind);
#pragma omp barrier
        }
        if (!refused() && p->staged.stages > 0) run_stages(p, table, &*schedule, threads);
        if (!refused())
          for (int share = omp_get_thread_num(); share < threads; share += team)
            schedule->run(share, kApplyPass, [&](int64_t i) { apply_chunk(p, table.rules, i); });
        if (!refused()) questions.tell(gather);
      }
    }
  }
  if (!gathered || p->failed) return Outcome::stale;
  if (refused()) return p->policy == NonFinite::skip ? Outcome::skipped : Outcome::nonfinite;
  for (size_t t = 0; t < p->slots.size(); ++t) {
    Slot& slot = p->slots[t];
    if (slot.norm_sq != nullptr) *slot.norm_sq = p->norm_sq[t];
    if (!slot.active) continue;
    if (slot.scale != nullptr) *slot.scale = p->staged.values[0][t];
    slot.first = false;
    if (slot.steps != nullptr) *slot.steps += 1.0f;
  }
  return Outcome::applied;
}

void parallel_ranges(int64_t count, int64_t grain, int threads,
                     void (*body)(void* context, int64_t begin, int64_t end), void* context) {
  if (in_forked_child() || count <= grain || threads <= 1) {
    body(context, 0, count);
    return;
  }
  const int64_t pieces = (count + grain - 1) / grain;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < pieces; ++i) body(context, i * grain, std::min(count, (i + 1) * grain));
}

}  // namespace pysmooth

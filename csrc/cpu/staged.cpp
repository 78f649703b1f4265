#include "cpu/staged.h"

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "core/random.h"

namespace pysmooth {
namespace {

// Chunks that a thread takes at a time, of one tensor.
constexpr int64_t kAbsorbGrain = 2;

class Stages {
 public:
  Stages(Pipeline* p, const KernelTable& table, Schedule* schedule, int threads)
      : p_(p), s_(p->staged), table_(table), schedule_(schedule), threads_(threads) {}

  void run() {
    if (s_.selects) sample();
    for (int stage = 0; stage < s_.stages; ++stage) {
      each_chunk(kSourcePass + stage, [&](size_t i) { source(stage, i); });
      barrier();
      one([&] { finish(stage); });
      if (stage == 0 && s_.selects) select();
    }
  }

 private:
  template <class Body>
  void each_chunk(int pass, Body body) {
    const int team = omp_get_num_threads();
    for (int share = omp_get_thread_num(); share < threads_; share += team)
      schedule_->run(share, pass, [&](int64_t i) { body(static_cast<size_t>(i)); });
  }
  template <class Body>
  void each_unit(Body body) {
    const auto units = static_cast<int>(s_.units.size());
#pragma omp for schedule(dynamic, 1)
    for (int u = 0; u < units; ++u) body(static_cast<size_t>(u));
  }
  template <class Body>
  void one(Body body) {
#pragma omp single
    body();
  }
  static void barrier() {
#pragma omp barrier
  }

  const Slot& slot_of(size_t chunk) const { return p_->slots[tensor_of(chunk)]; }
  size_t tensor_of(size_t chunk) const {
    return static_cast<size_t>(p_->chunks[static_cast<int64_t>(chunk)].tensor);
  }
  const RuleInfo& rule_of(const Slot& slot) const { return table_.rules[slot.rule]; }
  ApplyArgs args(size_t chunk) const {
    return args_of(*p_, rule_of(slot_of(chunk)), p_->chunks[static_cast<int64_t>(chunk)]);
  }

  // ---- sources

  void source(int stage, size_t i) {
    static thread_local std::vector<Candidate> room;
    const Slot& slot = slot_of(i);
    const RuleInfo& rule = rule_of(slot);
    s_.results[i] = {};
    if (!slot.active || stage >= rule.stages) return;
    ApplyArgs a = args(i);
    a.signs = s_.signs_of(static_cast<int64_t>(i));
    // What apply, or a selection, rounds after this is rounded by other noise.
    a.noise = a.noise.shifted(kNoisePass * (1 + stage));
    SourceTask task;
    task.sum = rule.stage_sum(a.hyper, stage);
    task.reads_param = rule.reads_param(a.hyper, stage);
    const bool selects = stage == 0 && s_.active[tensor_of(i)];
    const bool filters = selects && p_->select.kind == Selector::top_k;
    if (filters) {
      room.resize(kChunk);
      task.filter = blocks() ? kAnyMagnitude : unit(i).filter;
      task.out = room.data();
    }
    const SourceInfo& info = table_.sources[slot.rule];
    const Compute compute = compute_of(slot.param_dtype);
    const SourceFn run = slot.absorbed ? info.absorbed[compute] : info.source[stage][compute];
    s_.results[i] = run(a, task);
    if (!filters) return;
    std::vector<Candidate>& list = s_.lists[i];
    int64_t count = s_.results[i].candidates;
    if (blocks()) {
      static thread_local std::vector<uint64_t> scratch;
      static thread_local std::vector<Candidate> chosen;
      chosen.resize(kChunk);
      count = choose_blocks(p_->select, a.length, room.data(), count, chosen.data(), &scratch);
      list.assign(chosen.begin(), chosen.begin() + count);
      return;
    }
    // Once a unit has too many candidates they will not be used.
    std::atomic<int64_t>& kept = s_.kept[static_cast<size_t>(s_.unit_of[tensor_of(i)])];
    if (kept.fetch_add(count, std::memory_order_relaxed) > candidate_limit(unit(i))) count = 0;
    list.assign(room.begin(), room.begin() + count);
  }

  // Sums up, in the order of chunks, over the scope of the stage.
  void finish(int stage) {
    const size_t tensors = p_->slots.size();
    std::vector<double>& out = s_.values[stage];
    const Scope scope = p_->stage_scope[stage];
    const auto unit_of = [&](size_t t) {
      return scope == Scope::global  ? size_t{0}
             : scope == Scope::group ? static_cast<size_t>(p_->slots[t].group)
                                     : t;
    };
    const size_t units = scope == Scope::global  ? 1
                         : scope == Scope::group ? p_->groups.size()
                                                 : tensors;
    std::vector<double> sum(units, 0.0), elements(units, 0.0);
    const auto each = [&](auto body) {
      for (size_t t = 0; t < tensors; ++t)
        if (p_->slots[t].active && stage < rule_of(p_->slots[t]).stages) body(t);
    };
    each([&](size_t t) {
      double total = 0.0;
      for (int64_t i = p_->chunks.first(static_cast<int64_t>(t));
           i < p_->chunks.first(static_cast<int64_t>(t) + 1); ++i)
        total += s_.results[static_cast<size_t>(i)].sum;
      sum[unit_of(t)] += total;
      elements[unit_of(t)] += static_cast<double>(p_->slots[t].numel);
    });
    each([&](size_t t) {
      const Slot& slot = p_->slots[t];
      const double* hyper = p_->groups[static_cast<size_t>(slot.group)].hyper;
      const size_t u = unit_of(t);
      out[t] = rule_of(slot).stage_sum(hyper, stage) == Sum::squares ? std::sqrt(sum[u])
                                                                     : sum[u] / elements[u];
    });
  }

  // ---- selection

  bool blocks() const { return p_->select.scope == SelectScope::block; }
  SelectUnit& unit(size_t chunk) const {
    return s_.units[static_cast<size_t>(s_.unit_of[tensor_of(chunk)])];
  }

  void read(size_t t, int64_t begin, int64_t length, bool again, double* out) const {
    const Slot& slot = p_->slots[t];
    const Chunk piece{static_cast<int32_t>(t), static_cast<int32_t>(length), begin};
    const ApplyArgs a = args_of(*p_, rule_of(slot), piece);
    table_.sources[slot.rule].values[compute_of(slot.param_dtype)](a, again || slot.absorbed, out);
  }

  void sample() {
    if (p_->select.kind != Selector::top_k || blocks()) return;
    each_unit([&](size_t u) {
      static thread_local std::vector<Stretch> places;
      static thread_local std::vector<uint64_t> keys;
      plan_sample(&s_.units[u], s_.numels, s_.active, &places);
      keys.clear();
      double values[64];
      // Each place costs a miss per stream: have several under way.
      constexpr size_t kAhead = 12;
      for (size_t j = 0; j < std::min(kAhead, places.size()); ++j) touch(places[j]);
      for (size_t j = 0; j < places.size(); ++j) {
        if (j + kAhead < places.size()) touch(places[j + kAhead]);
        const Stretch& x = places[j];
        read(x.slot, x.begin, x.length, false, values);
        for (int64_t i = 0; i < x.length; ++i) keys.push_back(magnitude_key(values[i]));
      }
      if (!keys.empty()) set_filter(&s_.units[u], &keys);
      s_.kept[u].store(0, std::memory_order_relaxed);
    });
  }

  void touch(const Stretch& place) const {
    const Slot& slot = p_->slots[place.slot];
    if (slot.layout != nullptr) return;
    const auto fetch = [&](const void* base, DType dtype) {
      __builtin_prefetch(static_cast<const char*>(base) + place.begin * itemsize(dtype));
    };
    fetch(slot.grad, slot.grad_dtype);
    for (int k = 0; k < kMaxStates; ++k)
      if (slot.state[k] != nullptr) fetch(slot.state[k], slot.state_dtype[k]);
  }

  void select() {
    if (p_->select.kind == Selector::rand_k) {
      each_unit([&](size_t u) { draw(u); });
    } else if (!blocks()) {
      each_unit([&](size_t u) {
        static thread_local std::vector<uint64_t> scratch;
        counts_of(u);
        s_.units[u].second_look =
            !choose(&s_.units[u], p_->chunks, s_.active, counts_, &s_.lists, &scratch);
      });
      for (size_t u = 0; u < s_.units.size(); ++u)
        if (s_.units[u].second_look) look_again(u);
      one([&] {
        for (const SelectUnit& unit : s_.units) {
          s_.selections += unit.k > 0 ? 1 : 0;
          s_.second_looks += unit.second_look ? 1 : 0;
        }
      });
    }
    each_chunk(kSelectedPass, [&](size_t i) {
      const Slot& slot = slot_of(i);
      if (!s_.active[tensor_of(i)] || s_.lists[i].empty()) return;
      const bool random = p_->select.kind == Selector::rand_k;
      double scale = 1.0;
      if (random && p_->select.scaled)
        scale =
            static_cast<double>(slot.numel) / static_cast<double>(p_->select.chosen_of(slot.numel));
      table_.sources[slot.rule].selected[compute_of(slot.param_dtype)](
          args(i), {s_.lists[i].data(), static_cast<int64_t>(s_.lists[i].size()), random, scale});
    });
    barrier();
  }

  // counts_ is per thread: each thread has its own Stages.
  void counts_of(size_t u) {
    counts_.resize(s_.results.size());
    each_chunk_of(u, [&](size_t i) { counts_[i] = s_.results[i].candidates; });
  }
  template <class Body>
  void each_chunk_of(size_t u, Body body) const {
    const SelectUnit& unit = s_.units[u];
    for (size_t t = unit.first_slot; t < unit.last_slot; ++t) {
      if (!s_.active[t]) continue;
      for (int64_t i = p_->chunks.first(static_cast<int64_t>(t));
           i < p_->chunks.first(static_cast<int64_t>(t) + 1); ++i)
        body(static_cast<size_t>(i));
    }
  }

  // Rand-k: the first k of a permutation of the tensor's elements.
  void draw(size_t u) {
    const SelectUnit& unit = s_.units[u];
    each_chunk_of(u, [&](size_t i) { s_.lists[i].clear(); });
    const size_t t = unit.first_slot;
    if (unit.k == 0) return;
    const auto step = static_cast<uint32_t>(*p_->slots[t].steps);
    const Permutation order(static_cast<uint64_t>(unit.elements), p_->select.seed, step,
                            static_cast<uint32_t>(t));
    const auto first = static_cast<size_t>(p_->chunks.first(static_cast<int64_t>(t)));
    for (int64_t j = 0; j < unit.k; ++j) {
      const uint64_t index = order(static_cast<uint64_t>(j));
      s_.lists[first + index / kChunk].push_back({0.0, static_cast<uint32_t>(index % kChunk)});
    }
  }

  // All threads together: digit by digit, then who it is.
  void look_again(size_t u) {
    std::vector<size_t> chunks;
    each_chunk_of(u, [&](size_t i) { chunks.push_back(i); });
    const auto each = [&](auto body) {
      static thread_local std::vector<double> values;
      values.resize(kChunk);
      const auto count = static_cast<int64_t>(chunks.size());
#pragma omp for schedule(static)
      for (int64_t j = 0; j < count; ++j) {
        const Chunk& chunk = p_->chunks[static_cast<int64_t>(chunks[static_cast<size_t>(j)])];
        read(static_cast<size_t>(chunk.tensor), chunk.begin, chunk.length, true, values.data());
        body(static_cast<size_t>(j), values.data(), static_cast<int64_t>(chunk.length));
      }
    };
    RadixSelection radix(s_.units[u].k);  // every thread keeps the same one
    std::vector<int64_t> mine(RadixSelection::kDigits);
    while (!radix.settled()) {
      one([&] { s_.histogram.assign(RadixSelection::kDigits, 0); });
      std::fill(mine.begin(), mine.end(), 0);
      each([&](size_t, const double* values, int64_t n) { radix.count(values, n, mine.data()); });
#pragma omp critical(pysmooth_histogram)
      for (size_t d = 0; d < mine.size(); ++d) s_.histogram[d] += mine[d];
      barrier();
      radix.narrow(s_.histogram.data());
      barrier();
    }
    one([&] { s_.ties.assign(chunks.size() + 1, 0); });
    each([&](size_t j, const double* values, int64_t n) {
      s_.ties[j + 1] = radix.equals(values, n);
    });
    one([&] {
      for (size_t j = 0; j < chunks.size(); ++j) s_.ties[j + 1] += s_.ties[j];
    });
    each([&](size_t j, const double* values, int64_t n) {
      radix.take(values, n, s_.ties[j], &s_.lists[chunks[j]]);
    });
  }

  Pipeline* p_;
  Staged& s_;
  const KernelTable& table_;
  Schedule* schedule_;
  int threads_;
  std::vector<int64_t> counts_;
};

}  // namespace

Outcome absorb(Pipeline* p, size_t t, int threads) {
  Slot& slot = p->slots[t];
  struct Context {
    Pipeline* pipeline;
    const RuleInfo* rule;
    SourceFn take;
    int64_t first;
  };
  const RuleInfo& rule = kernels().rules[slot.rule];
  Context context{p, &rule, kernels().sources[slot.rule].source[0][compute_of(slot.param_dtype)],
                  p->chunks.first(static_cast<int64_t>(t))};
  const int64_t count = p->chunks.first(static_cast<int64_t>(t) + 1) - context.first;
  p->reduced = false;
  for (std::vector<double>& values : p->staged.values) values.resize(p->slots.size());
  if (asks_first(p->policy)) {
    parallel_ranges(
        count, kAbsorbGrain, threads,
        [](void* given, int64_t from, int64_t to) {
          const auto& c = *static_cast<Context*>(given);
          for (int64_t i = c.first + from; i < c.first + to; ++i) {
            const Chunk& chunk = c.pipeline->chunks[i];
            const Slot& s = c.pipeline->slots[static_cast<size_t>(chunk.tensor)];
            c.pipeline->partials[static_cast<size_t>(i)] =
                reduce_chunk(s.grad, s.grad_dtype, s.grad_layout, chunk, c.pipeline->norm_type);
          }
        },
        &context);
    for (int64_t i = context.first; i < context.first + count; ++i)
      if (p->partials[static_cast<size_t>(i)].nonfinite) return Outcome::nonfinite;
  }
  parallel_ranges(
      count, kAbsorbGrain, threads,
      [](void* given, int64_t from, int64_t to) {
        const auto& c = *static_cast<Context*>(given);
        for (int64_t i = c.first + from; i < c.first + to; ++i) {
          ApplyArgs a = args_of(*c.pipeline, *c.rule, c.pipeline->chunks[i]);
          a.noise = a.noise.shifted(kNoisePass);
          SourceTask task;
          task.reads_param = c.rule->reads_param(a.hyper, 0);
          c.take(a, task);
        }
      },
      &context);
  // What was sent in the last step has been taken off.
  if (slot.scale != nullptr) *slot.scale = 0.0;
  return Outcome::applied;
}

void prepare_stages(Pipeline* p, const KernelTable& table) {
  Staged& s = p->staged;
  const size_t tensors = p->slots.size();
  s.stages = 0;
  s.selects = false;
  for (const Slot& slot : p->slots)
    if (slot.active) s.stages = std::max(s.stages, table.rules[slot.rule].stages);
  if (s.stages == 0) return;
  for (std::vector<double>& values : s.values) values.assign(tensors, 0.0);
  s.results.resize(static_cast<size_t>(p->chunks.size()));
  s.signs_at.clear();
  const bool signs = std::any_of(p->slots.begin(), p->slots.end(), [&](const Slot& slot) {
    return slot.active && table.rules[slot.rule].sends_signs;
  });
  if (signs) {
    size_t words = 0;
    for (int64_t i = 0; i < p->chunks.size(); ++i) {
      s.signs_at.push_back(words);
      words += static_cast<size_t>(p->chunks[i].length + 63) / 64;
    }
    if (s.signs.size() < words) s.signs.resize(words);
  }
  s.active.assign(tensors, 0);
  s.numels.resize(tensors);
  s.units.clear();
  s.unit_of.assign(tensors, -1);
  const bool global = p->select.scope == SelectScope::global;
  for (size_t t = 0; t < tensors; ++t) {
    const Slot& slot = p->slots[t];
    s.numels[t] = slot.numel;
    const RuleInfo& rule = table.rules[slot.rule];
    if (!slot.active || !rule.selects) continue;
    if (rule.selects_nothing(p->groups[static_cast<size_t>(slot.group)].hyper)) continue;
    s.selects = true;
    s.active[t] = 1;
    if (!global || s.units.empty()) s.units.push_back({t, t + 1, 0, 0, 0.0, false, false});
    SelectUnit& unit = s.units.back();
    unit.last_slot = t + 1;
    unit.elements += slot.numel;
    s.unit_of[t] = static_cast<int>(s.units.size()) - 1;
  }
  if (!s.selects) return;
  s.lists.resize(static_cast<size_t>(p->chunks.size()));
  s.kept = std::make_unique<std::atomic<int64_t>[]>(s.units.size());
  for (SelectUnit& unit : s.units) unit.k = p->select.chosen_of(unit.elements);
}

void run_stages(Pipeline* p, const KernelTable& table, Schedule* schedule, int threads) {
  Stages(p, table, schedule, threads).run();
}

}  // namespace pysmooth

#include "cpu/staged.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/random.h"

namespace pysmooth {
namespace {

// Chunks that a thread takes at a time, of one tensor.
constexpr int64_t kAbsorbGrain = 2;

// What a rule is told of a sum.
double told_of(Sum kind, double sum, double elements) {
  return kind == Sum::squares ? std::sqrt(sum) : sum / elements;
}

class Stages {
 public:
  Stages(Pipeline* p, const KernelTable& table, Schedule* schedule, int threads)
      : p_(p), s_(p->staged), table_(table), schedule_(schedule), threads_(threads) {}

  void run() {
    for (int stage = 0; stage < s_.stages; ++stage) {
      if (stage < s_.selected_passes) sample(stage);
      each_chunk(kSourcePass + stage, [&](size_t i) { source(stage, i); });
      if (stage < s_.selected_passes) count_in(-1);
      barrier();
      caller([&] { finish(stage); });
      if (p_->failed) return;
      if (stage < s_.selected_passes) select(stage);
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
  // On the thread that called run_step, which may talk to other processes.
  template <class Body>
  void caller(Body body) {
#pragma omp master
    body();
    barrier();
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
    const Slot& slot = slot_of(i);
    const RuleInfo& rule = rule_of(slot);
    s_.results[i] = {};
    if (!slot.active || stage >= rule.stages) return;
    ApplyArgs a = args(i);
    s_.hand_bits(static_cast<int64_t>(i), &a);
    // What apply, or a selection, rounds after this is rounded by other noise.
    a.noise = a.noise.shifted(kNoisePass * (1 + stage));
    SourceTask task;
    task.sum = rule.stage_sum(a.hyper, stage);
    task.reads_param = rule.reads_param(a.hyper, stage);
    const bool selects = stage < rule.selections && s_.active[tensor_of(i)];
    const bool filters = selects && p_->select.kind == Selector::top_k;
    if (!filters && task.sum == Sum::none && (rule.idle >> stage & 1u) != 0) return;
    if (filters) {
      task.filter = blocks() ? kAnyMagnitude : unit(i).filter;
      task.room = open(i);
    }
    const SourceInfo& info = table_.sources[slot.rule];
    const Compute compute = compute_of(slot.param_dtype);
    const SourceFn run = slot.absorbed ? info.absorbed[compute] : info.source[stage][compute];
    if (p_->scales_blocks())
      return each_block(*p_, static_cast<int64_t>(i), a, stage,
                        [&](const ApplyArgs& block, size_t number) {
                          const double sum = run(block, task).sum;
                          if (p_->stage_scope[stage] != Scope::block)
                            s_.results[i].sum += sum;
                          else
                            s_.block_values[stage][number] =
                                told_of(task.sum, sum, static_cast<double>(block.length));
                        });
    s_.results[i] = run(a, task);
    if (!filters) return;
    Picks picks = task.room;
    picks.count = s_.results[i].candidates;
    if (blocks()) {
      static thread_local std::vector<uint64_t> scratch;
      choose_blocks(p_->select, a.length, &picks, &scratch);
      return keep(i, picks);
    }
    // Once a unit has too many candidates they will not be used.
    std::atomic<int64_t>& kept = s_.kept[static_cast<size_t>(s_.unit_of[tensor_of(i)])];
    if (kept.fetch_add(picks.count, std::memory_order_relaxed) > candidate_limit(unit(i)))
      picks.count = 0;
    keep(i, picks);
    if (unit(i).complete) return;
    count_in(s_.unit_of[tensor_of(i)]);
    tally(picks, unit(i).filter, tally_.data());
  }

  Picks open(size_t chunk) {
    return store_.open(p_->chunks[static_cast<int64_t>(chunk)].length,
                       compute_of(slot_of(chunk).param_dtype) == kDouble);
  }
  void keep(size_t chunk, const Picks& picks) {
    store_.keep(picks);
    s_.lists[chunk] = picks;
  }

  // A thread tallies one unit's candidates at a time: what it has is added up, and it goes on to
  // the next one. Sums of integers do not depend on who is first.
  void count_in(int next) {
    if (next == tallied_) return;
    if (tallied_ >= 0) {
      std::vector<uint32_t>& sum = s_.tallies[static_cast<size_t>(tallied_)];
#pragma omp critical(pysmooth_tally)
      for (size_t b = 0; b < sum.size(); ++b) sum[b] += tally_[b];
    }
    tallied_ = next;
    if (next >= 0) tally_.assign(kTallyBuckets, 0);
  }

  // Sums up, in the order of chunks, over the scope of the stage.
  void finish(int stage) {
    const size_t tensors = p_->slots.size();
    std::vector<double>& out = s_.values[stage];
    const Scope scope = p_->stage_scope[stage];
    if (scope == Scope::block) return;
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
    std::vector<double>& totals = p_->sums;
    totals.assign(tensors, 0.0);
    each([&](size_t t) {
      double total = 0.0;
      for (int64_t i = p_->chunks.first(static_cast<int64_t>(t));
           i < p_->chunks.first(static_cast<int64_t>(t) + 1); ++i)
        total += s_.results[static_cast<size_t>(i)].sum;
      totals[t] = total;
    });
    if (p_->exchange != nullptr) {
      p_->flags.assign(tensors, 0.0);
      p_->exchange->tensors(Reduction::sum_squares, &totals, &p_->flags);
    }
    each([&](size_t t) {
      sum[unit_of(t)] += totals[t];
      elements[unit_of(t)] += static_cast<double>(p_->slots[t].elements);
    });
    if (p_->exchange != nullptr) {
      double flag = 0.0;
      sum.insert(sum.end(), elements.begin(), elements.end());
      p_->exchange->units(Reduction::sum_squares, scope, &sum, &flag);
      std::copy_n(sum.end() - static_cast<ptrdiff_t>(units), units, elements.begin());
    }
    each([&](size_t t) {
      const Slot& slot = p_->slots[t];
      const double* hyper = p_->groups[static_cast<size_t>(slot.group)].hyper;
      const size_t u = unit_of(t);
      out[t] = told_of(rule_of(slot).stage_sum(hyper, stage), sum[u], elements[u]);
    });
  }

  // ---- selection

  bool blocks() const { return p_->select.scope == SelectScope::block; }
  SelectUnit& unit(size_t chunk) const {
    return s_.units[static_cast<size_t>(s_.unit_of[tensor_of(chunk)])];
  }

  // Stretches of one slot.
  void read(int stage, const Stretch* stretches, size_t count, bool again, double* out) const {
    const size_t t = stretches->slot;
    const Slot& slot = p_->slots[t];
    const ApplyArgs a = args_of(*p_, rule_of(slot), {static_cast<int32_t>(t), 0, 0});
    table_.sources[slot.rule].values[stage][compute_of(slot.param_dtype)](
        a, stretches, static_cast<int64_t>(count), again || slot.absorbed, out);
  }

  void sample(int stage) {
    if (p_->select.kind != Selector::top_k || blocks()) return;
    if (p_->selects_jointly) {  // the list would be of this part alone: nothing goes there
      one([&] {
        for (SelectUnit& unit : s_.units) unit.filter = HUGE_VAL, unit.complete = true;
      });
      return;
    }
    each_unit([&](size_t u) {
      static thread_local std::vector<Stretch> places;
      static thread_local std::vector<double> values;
      static thread_local std::vector<uint64_t> keys, scratch;
      SelectUnit& unit = s_.units[u];
      plan_sample(&unit, s_.numels, s_.active, &places);
      s_.kept[u].store(0, std::memory_order_relaxed);
      if (places.empty()) return;
      int64_t size = 0;
      for (const Stretch& x : places) size += x.length;
      values.resize(static_cast<size_t>(size));
      double* out = values.data();
      for (size_t j = 0, next; j < places.size(); j = next) {
        int64_t length = 0;
        for (next = j; next < places.size() && places[next].slot == places[j].slot; ++next)
          length += places[next].length;
        read(stage, &places[j], next - j, false, out);
        out += length;
      }
      keys.resize(values.size());
      for (size_t j = 0; j < values.size(); ++j) keys[j] = magnitude_key(values[j]);
      set_filter(&unit, keys, &scratch);
      if (!unit.complete) s_.tallies[u].assign(kTallyBuckets, 0);
    });
  }

  void select(int stage) {
    if (p_->select.kind == Selector::rand_k) {
      each_unit([&](size_t u) { draw(u); });
    } else if (!blocks()) {
      each_unit([&](size_t u) {
        static thread_local std::vector<uint64_t> scratch;
        int64_t found = 0;
        const std::vector<size_t> chunks = chunks_of(u);
        for (const size_t i : chunks) found += s_.results[i].candidates;
        SelectUnit& unit = s_.units[u];
        unit.second_look = p_->selects_jointly ||
                           !choose(&unit, chunks, found, s_.tallies[u].data(), &s_.lists, &scratch);
      });
      look_again(stage);
      one([&] {
        for (const SelectUnit& unit : s_.units) {
          s_.selections += unit.k > 0 ? 1 : 0;
          s_.second_looks += unit.second_look ? 1 : 0;
        }
      });
    }
    if (p_->failed) return;
    each_chunk(kSelectedPass + stage, [&](size_t i) {
      const Slot& slot = slot_of(i);
      const bool marks = rule_of(slot).marks;
      if (!s_.active[tensor_of(i)] || (s_.lists[i].count == 0 && !marks)) return;
      ApplyArgs a = args(i);
      s_.hand_bits(static_cast<int64_t>(i), &a);
      const bool random = p_->select.kind == Selector::rand_k;
      const double scale = p_->select.scale_of(slot.numel);
      table_.sources[slot.rule].selected[compute_of(slot.param_dtype)](
          a, {s_.lists[i], unit(i).threshold, random, scale, marks ? a.bits[stage] : nullptr});
    });
    barrier();
  }

  std::vector<size_t> chunks_of(size_t u) const {
    std::vector<size_t> chunks;
    const SelectUnit& unit = s_.units[u];
    for (size_t t = unit.first_slot; t < unit.last_slot; ++t) {
      if (!s_.active[t]) continue;
      for (int64_t i = p_->chunks.first(static_cast<int64_t>(t));
           i < p_->chunks.first(static_cast<int64_t>(t) + 1); ++i)
        chunks.push_back(static_cast<size_t>(i));
    }
    return chunks;
  }

  // Rand-k: the first k of a permutation of the tensor's elements.
  void draw(size_t u) {
    const SelectUnit& unit = s_.units[u];
    const std::vector<size_t> chunks = chunks_of(u);
    for (const size_t i : chunks) s_.lists[i] = {};
    const size_t t = unit.first_slot;
    if (unit.k == 0) return;
    const auto step = static_cast<uint32_t>(*p_->slots[t].steps);
    const Permutation order(static_cast<uint64_t>(unit.elements), p_->select.seed, step,
                            static_cast<uint32_t>(t));
    static thread_local std::vector<uint64_t> drawn;
    drawn.clear();
    for (int64_t j = 0; j < unit.k; ++j) drawn.push_back(order(static_cast<uint64_t>(j)));
    const size_t first = chunks.front();
    for (const uint64_t index : drawn) ++s_.lists[first + index / kChunk].count;
    for (const size_t i : chunks) {
      Picks picks = open(i);
      picks.count = s_.lists[i].count;
      keep(i, picks);
      s_.lists[i].count = 0;
    }
    for (const uint64_t index : drawn) {
      Picks& picks = s_.lists[first + index / kChunk];
      picks.index[picks.count++] = static_cast<uint32_t>(index % kChunk);
    }
  }

  // All threads together, for all units that need it: digit by digit, then who it is.
  void look_again(int stage) {
    std::vector<size_t> chunks, slots, ends;  // ends: how many chunks there are up to a unit's last
    std::vector<size_t> look_of;              // of each chunk
    std::vector<RadixSelection> looks;        // every thread keeps the same ones
    for (size_t u = 0; u < s_.units.size(); ++u) {
      if (!s_.units[u].second_look) continue;
      const std::vector<size_t> own = chunks_of(u);
      chunks.insert(chunks.end(), own.begin(), own.end());
      look_of.resize(chunks.size(), looks.size());
      ends.push_back(chunks.size());
      slots.push_back(s_.units[u].first_slot);
      looks.emplace_back(s_.units[u].k);
    }
    if (looks.empty()) return;
    const auto each = [&](auto body) {
      static thread_local std::vector<double> values;
      values.resize(kChunk);
      const auto count = static_cast<int64_t>(chunks.size());
#pragma omp for schedule(static) nowait
      for (int64_t j = 0; j < count; ++j) {
        const Chunk& chunk = p_->chunks[static_cast<int64_t>(chunks[static_cast<size_t>(j)])];
        const Stretch all{static_cast<size_t>(chunk.tensor), chunk.begin, chunk.length};
        read(stage, &all, 1, true, values.data());
        body(static_cast<size_t>(j), values.data(), static_cast<int64_t>(chunk.length));
      }
    };
    constexpr size_t kDigits = RadixSelection::kDigits;
    std::vector<int64_t> mine(kDigits);  // of one look at a time
    const auto add_up = [&](size_t look) {
      int64_t* const sum = &s_.histograms[look * kDigits];
#pragma omp critical(pysmooth_histogram)
      for (size_t d = 0; d < kDigits; ++d) sum[d] += mine[d];
      std::fill(mine.begin(), mine.end(), 0);
    };
    while (!looks.front().settled()) {
      one([&] { s_.histograms.assign(looks.size() * kDigits, 0); });
      size_t at = looks.size();
      each([&](size_t j, const double* values, int64_t n) {
        if (look_of[j] != at && at < looks.size()) add_up(at);
        at = look_of[j];
        looks[at].count(values, n, mine.data());
      });
      if (at < looks.size()) add_up(at);
      barrier();
      if (p_->selects_jointly) caller([&] { p_->exchange->digits(slots, &s_.histograms); });
      for (size_t i = 0; i < looks.size(); ++i) looks[i].narrow(&s_.histograms[i * kDigits]);
      barrier();
    }
    one([&] { s_.ties.assign(chunks.size(), 0); });
    each([&](size_t j, const double* values, int64_t n) {
      s_.ties[j] = looks[look_of[j]].equals(values, n);
    });
    barrier();
    caller([&] { number_ties(slots, ends); });
    each([&](size_t j, const double* values, int64_t n) {
      Picks picks = open(chunks[j]);
      looks[look_of[j]].take(values, n, s_.ties[j], &picks);
      keep(chunks[j], picks);
    });
    barrier();
  }

  // How many of each chunk equal their unit's threshold becomes how many there are before it.
  void number_ties(const std::vector<size_t>& slots, const std::vector<size_t>& ends) {
    std::vector<int64_t> before(ends.size(), 0);
    for (size_t i = 0, j = 0; i < ends.size(); ++i)
      for (; j < ends[i]; ++j) before[i] += std::exchange(s_.ties[j], before[i]);
    if (!p_->selects_jointly) return;
    p_->exchange->before(slots, &before);
    for (size_t i = 0, j = 0; i < ends.size(); ++i)
      for (; j < ends[i]; ++j) s_.ties[j] += before[i];
  }

  Pipeline* p_;
  Staged& s_;
  const KernelTable& table_;
  Schedule* schedule_;
  int threads_;
  // Of this thread: each has its own Stages.
  PickStore& store_ = s_.stores[static_cast<size_t>(omp_get_thread_num())];
  int tallied_ = -1;  // the unit whose candidates tally_ counts
  std::vector<uint32_t> tally_;
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

void run_stages(Pipeline* p, const KernelTable& table, Schedule* schedule, int threads) {
  Stages(p, table, schedule, threads).run();
}

}  // namespace pysmooth

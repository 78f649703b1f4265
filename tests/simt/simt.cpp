#include "simt.h"

#include <signal.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "fiber.h"
#include "memory.h"
#include "race.h"

namespace simt {
namespace {

struct Block;

struct Thread {
  enum class State { ready, at_block, at_warp, at_grid, done };
  State state = State::ready;
  Context context;
  void* stack = nullptr;
  Place place;
  Block* block = nullptr;
  int site = 0;  // the line it waits at
  // A warp exchange: what is handed in, from whom it wants something, what it gets.
  uint32_t mask = 0;
  uint64_t value = 0, result = 0;
  unsigned source = 0;
  bool votes = false;
  bool in_atomic = false;
  Knowledge known;
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Thread*> all;
  std::map<const void*, void*> shared;
};

struct Launch {
  const std::function<void()>* kernel = nullptr;
  std::vector<std::unique_ptr<Block>> resident;
  Context scheduler;
  Thread* running = nullptr;
  std::mt19937_64 random;
  unsigned threads = 0;
  dim3 grid;
  bool all_resident = false, races = false;
  size_t at_grid = 0;  // threads that wait for the whole launch
};

Launch* now = nullptr;
std::string error;
RaceCheck race_check;
std::vector<void*> stacks;

using State = Thread::State;

Thread& self() { return *now->running; }
void yield() { switch_to(&self().context, &now->scheduler); }

std::string name(const Thread& t) {
  return "thread " + std::to_string(t.place.thread.x) + " of block " +
         std::to_string(t.place.block.x);
}

void meet(const std::vector<Thread*>& threads) {
  for (Thread* t : threads) {
    if (t->site != self().site)
      fail(name(*t) + " and " + name(self()) + " meet at different barriers, lines " +
           std::to_string(t->site) + " and " + std::to_string(self().site));
    t->state = State::ready;
  }
  if (!now->races) return;
  Clock all = threads[0]->known.now;
  for (const Thread* t : threads) join(&all, t->known.now);
  for (Thread* t : threads) {
    t->known.now = all;
    t->known.step();
  }
}

// Waits until all of `others`, this thread among them, are in the same state.
template <class Finish>
void wait_for(State state, int site, const std::vector<Thread*>& others, Finish finish) {
  self().state = state;
  self().site = site;
  const bool complete = std::all_of(others.begin(), others.end(), [&](const Thread* t) {
    return t->state == state && t->mask == self().mask;
  });
  if (complete) {
    finish();
    meet(others);
  } else {
    yield();
  }
}

std::vector<Thread*> lanes_of(uint32_t mask) {
  std::vector<Thread*> out;
  const Thread& me = self();
  const unsigned first = me.place.thread.x / kWarp * kWarp;
  for (unsigned i = 0; i < kWarp; ++i)
    if ((mask >> i & 1u) != 0) {
      if (first + i >= me.block->threads.size())
        fail(name(me) + " waits for lane " + std::to_string(i) + ", which does not exist");
      out.push_back(me.block->threads[first + i].get());
    }
  if ((mask >> (me.place.thread.x % kWarp) & 1u) == 0)
    fail(name(me) + " is not in the mask that it waits with");
  return out;
}

void collective(uint32_t mask, int site,
                const std::function<void(const std::vector<Thread*>&)>& f) {
  const std::vector<Thread*> lanes = lanes_of(mask);
  self().mask = mask;
  wait_for(State::at_warp, site, lanes, [&] { f(lanes); });
  self().mask = 0;
}

void run_thread() {
  (*now->kernel)();
  self().state = State::done;
  yield();
  std::abort();
}

std::unique_ptr<Block> make_block(unsigned index) {
  auto block = std::make_unique<Block>();
  for (unsigned i = 0; i < now->threads; ++i) {
    auto t = std::make_unique<Thread>();
    t->place = {dim3(i), dim3(index), dim3(now->threads), now->grid};
    t->block = block.get();
    if (stacks.empty()) stacks.push_back(new_stack());
    t->stack = stacks.back();
    stacks.pop_back();
    if (now->races) t->known.begin(index * now->threads + i, now->grid.x * now->threads);
    start(&t->context, t->stack, run_thread);
    block->all.push_back(t.get());
    block->threads.push_back(std::move(t));
  }
  return block;
}

void end_block(Block* block) {
  for (const auto& t : block->threads) stacks.push_back(t->stack);
  for (const auto& [key, at] : block->shared) {
    const std::string wrong = check_surroundings(at);
    if (!wrong.empty() && error.empty()) error = "shared memory is " + wrong;
    release(at);
  }
}

std::string explain(const Launch& launch) {
  for (const auto& block : launch.resident)
    for (const auto& t : block->threads)
      if (t->state != State::done && t->state != State::ready)
        return "deadlock: " + name(*t) + " waits at line " + std::to_string(t->site) +
               " for threads that never come";
  return "deadlock";
}

// One turn of every thread that can run, in the order asked for.
bool turn() {
  std::vector<Thread*> ready;
  for (const auto& block : now->resident)
    for (const auto& t : block->threads)
      if (t->state == State::ready) ready.push_back(t.get());
  if (options().order == Order::backward) std::reverse(ready.begin(), ready.end());
  if (options().order == Order::shuffled) std::shuffle(ready.begin(), ready.end(), now->random);
  for (Thread* t : ready) {
    now->running = t;
    switch_to(&now->scheduler, &t->context);
    now->running = nullptr;
    if (!error.empty()) return false;
  }
  return !ready.empty();
}

void on_bad_access(int, siginfo_t*, void*) {
  if (now == nullptr || now->running == nullptr) {
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  fail("out of bounds: " + name(self()) + " touches memory that belongs to nobody");
}

// Out of bounds accesses end the launch, not the process.
class Trap {
 public:
  Trap() : stack_(64 << 10) {
    stack_t alternate{};
    alternate.ss_sp = stack_.data();
    alternate.ss_size = stack_.size();
    sigaltstack(&alternate, &stack_before_);
    struct sigaction action{};
    action.sa_sigaction = on_bad_access;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &before_);
  }
  ~Trap() {
    sigaction(SIGSEGV, &before_, nullptr);
    sigaltstack(&stack_before_, nullptr);
  }
  Trap(const Trap&) = delete;
  Trap& operator=(const Trap&) = delete;

 private:
  std::vector<char> stack_;
  stack_t stack_before_{};
  struct sigaction before_{};
};

}  // namespace

Options& options() {
  static Options all;
  return all;
}

std::string take_error() {
  std::string out;
  out.swap(error);
  return out;
}

void fail(const std::string& what) {
  if (error.empty()) error = what;
  switch_to(&self().context, &now->scheduler);
  std::abort();
}

void launch(dim3 grid, unsigned threads, bool cooperative, const std::function<void()>& kernel) {
  if (!error.empty() || grid.x == 0) return;
  const Trap trap;
  Launch launch;
  launch.kernel = &kernel;
  launch.threads = threads;
  launch.grid = grid;
  launch.all_resident = cooperative;
  launch.races = options().races;
  launch.random.seed(options().seed);
  now = &launch;
  race_check.clear();
  std::vector<unsigned> waiting(grid.x);
  for (unsigned i = 0; i < grid.x; ++i) waiting[i] = grid.x - 1 - i;
  if (options().order == Order::backward) std::reverse(waiting.begin(), waiting.end());
  if (options().order == Order::shuffled)
    std::shuffle(waiting.begin(), waiting.end(), launch.random);
  const size_t room = cooperative ? grid.x : static_cast<size_t>(std::max(1, options().resident));
  while (error.empty()) {
    while (launch.resident.size() < room && !waiting.empty()) {
      launch.resident.push_back(make_block(waiting.back()));
      waiting.pop_back();
    }
    if (launch.resident.empty()) break;
    if (!turn()) {
      if (error.empty()) error = explain(launch);
      break;
    }
    for (size_t i = launch.resident.size(); i-- > 0;) {
      const auto& all = launch.resident[i]->threads;
      if (std::any_of(all.begin(), all.end(),
                      [](const auto& t) { return t->state != State::done; }))
        continue;
      end_block(launch.resident[i].get());
      launch.resident.erase(launch.resident.begin() + static_cast<long>(i));
    }
  }
  for (const auto& block : launch.resident) end_block(block.get());
  now = nullptr;
}

const Place& place() { return self().place; }

void sync_block(int site) {
  wait_for(State::at_block, site, self().block->all, [] {});
}

// All threads of the launch, those of blocks that have ended too: they never come.
void sync_grid(int site) {
  if (!now->all_resident) fail("a grid barrier in a launch that is not cooperative");
  self().state = State::at_grid;
  self().site = site;
  if (++now->at_grid < size_t{now->grid.x} * now->threads) return yield();
  now->at_grid = 0;
  std::vector<Thread*> all;
  for (const auto& block : now->resident)
    all.insert(all.end(), block->all.begin(), block->all.end());
  meet(all);
}

void sync_warp(uint32_t mask, int site) {
  collective(mask, site, [](const std::vector<Thread*>&) {});
}

uint64_t exchange(uint32_t mask, uint64_t value, unsigned source, int site) {
  self().value = value;
  self().source = source;
  collective(mask, site, [mask](const std::vector<Thread*>& lanes) {
    const auto& all = self().block->threads;
    const unsigned first = self().place.thread.x / kWarp * kWarp;
    for (Thread* t : lanes)  // nobody said what a lane outside the mask hands out
      t->result = (mask >> t->source & 1u) != 0 ? all[first + t->source]->value : ~uint64_t{0};
  });
  return self().result;
}

uint32_t ballot(uint32_t mask, bool vote, int site) {
  self().votes = vote;
  collective(mask, site, [](const std::vector<Thread*>& lanes) {
    uint32_t bits = 0;
    for (const Thread* t : lanes) bits |= (t->votes ? 1u : 0u) << t->place.thread.x % kWarp;
    for (Thread* t : lanes) t->result = bits;
  });
  return static_cast<uint32_t>(self().result);
}

void fence() {
  if (now->races) self().known.fence();
}

void before_atomic(const void* at) {
  if (options().order == Order::shuffled) yield();
  if (now->races) race_check.atomic(&self().known, at);
  self().in_atomic = true;
}

void after_atomic() {
  self().in_atomic = false;
  if (now->races) self().known.step();
  if (options().order == Order::shuffled) yield();
}

void* shared(const void* key, size_t bytes) {
  void*& at = self().block->shared[key];
  if (at == nullptr) {
    at = allocate(bytes, 0, 0xFF);  // NaN in every format
    if (now->races) race_check.forget(at, bytes);
  }
  return at;
}

// Called for every access of a kernel's code: it is compiled as if for a thread sanitizer.
void on_access(const void* at, size_t bytes, bool writes) {
  if (now == nullptr || !now->races || now->running == nullptr || !in_arena(at)) return;
  const std::string wrong = race_check.access(self().known, at, bytes, writes, self().in_atomic);
  if (!wrong.empty()) fail(wrong);
}

}  // namespace simt

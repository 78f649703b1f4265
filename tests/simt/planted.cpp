// Kernels with one bug each, and their correct forms: what the emulation must tell apart.
//
// Every kernel adds up n integers into out[0] (or mirrors them), in one of the ways that kernels
// of this library work together.

#include <cstdint>

#include "simt.h"

namespace {

constexpr unsigned kThreads = 64;

struct Args {
  const int* in;
  int* out;
  unsigned* ticket;
  int* partial;
  int n;
};

using Room = int[kThreads];
Room& room() {
  static char key;
  return *static_cast<Room*>(simt::shared(&key, sizeof(Room)));
}

// A tree over shared memory. `bug` leaves out a barrier, or puts one where not all threads pass.
enum class Tree { good, unfilled, no_first, no_inner, no_last, divergent, different, out_of_room };

template <Tree kBug>
void tree(const Args& a) {
  Room& x = room();
  const unsigned t = threadIdx.x;
  int sum = 0;
  for (int i = static_cast<int>(t); i < a.n; i += kThreads) sum += a.in[i];
  if (kBug != Tree::unfilled || t % 2 == 0) x[t] = sum;
  if (kBug == Tree::out_of_room && t == 0) x[kThreads] = sum;
  if (kBug != Tree::no_first) __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (t < half) x[t] += x[t + half];
    if (kBug == Tree::divergent) {
      if (t < half) __syncthreads();
    } else if (kBug == Tree::different && half == 1) {
      if (t == 0)
        __syncthreads();
      else
        __syncthreads();
    } else if (kBug != Tree::no_inner) {
      __syncthreads();
    }
  }
  if (t == 0) *a.out = x[0];
  if (kBug != Tree::no_last) __syncthreads();
  x[(t + 1) % kThreads] = 0;  // the room's next use
}

// Shuffles down a warp.
enum class Warp { good, lane_left_out, early_exit, beyond };

template <Warp kBug>
void warp(const Args& a) {
  const unsigned t = threadIdx.x;
  int sum = 0;
  if (t < simt::kWarp)
    for (int i = static_cast<int>(t); i < a.n; i += simt::kWarp) sum += a.in[i];
  if (kBug == Warp::early_exit && t == 5) return;
  const uint32_t mask = kBug == Warp::lane_left_out ? 0xfffffffeu : 0xffffffffu;
  if (t >= simt::kWarp) return;
  for (unsigned by = simt::kWarp / 2; by > 0; by /= 2)
    sum +=
        kBug == Warp::beyond ? __shfl_sync(0xffffu, sum, t + by) : __shfl_down_sync(mask, sum, by);
  if (t == 0) *a.out = sum;
}

// Blocks leave partial sums; the last one adds them up.
enum class Last { good, no_fence_before, no_fence_after, no_barrier, plain_ticket, everybody };

template <Last kBug>
void last(const Args& a) {
  Room& x = room();
  const unsigned t = threadIdx.x;
  x[t] = 0;
  for (unsigned i = blockIdx.x * kThreads + t; i < static_cast<unsigned>(a.n);
       i += gridDim.x * kThreads)
    x[t] += a.in[i];
  a.partial[blockIdx.x * kThreads + t] = x[t];
  if (kBug != Last::no_barrier) __syncthreads();
  static char key;
  bool& is_last = *static_cast<bool*>(simt::shared(&key, 1));
  if (t == 0) {
    if (kBug != Last::no_fence_before) __threadfence();
    if (kBug == Last::plain_ticket)
      is_last = ++*a.ticket == gridDim.x;
    else
      is_last = atomicInc(a.ticket, gridDim.x - 1) == gridDim.x - 1;
    if (kBug == Last::everybody) is_last = true;
    if (kBug != Last::no_fence_after) __threadfence();
  }
  __syncthreads();
  if (!is_last || t != 0) return;
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x * kThreads; ++i) sum += a.partial[i];
  *a.out = sum;
}

// Every thread writes, all meet, one adds up; all meet again before what was read is overwritten.
enum class Grid { good, no_barrier, no_second, a_block_leaves, a_thread_leaves, different };

template <Grid kBug>
void grid(const Args& a) {
  const unsigned t = blockIdx.x * kThreads + threadIdx.x, all = gridDim.x * kThreads;
  int sum = 0;
  for (unsigned i = t; i < static_cast<unsigned>(a.n); i += all) sum += a.in[i];
  a.partial[t] = sum;
  if (kBug == Grid::a_block_leaves && blockIdx.x == 1) return;
  if (kBug == Grid::a_thread_leaves && t == 70) return;
  if (kBug == Grid::different && blockIdx.x == 1)
    simt::sync_grid(__LINE__);
  else if (kBug != Grid::no_barrier)
    simt::sync_grid(__LINE__);
  if (t == 0)
    for (unsigned i = 0; i < all; ++i) *a.out += a.partial[i];
  if (kBug != Grid::no_second) simt::sync_grid(__LINE__);
  a.partial[t] = 0;
}

// Ballots and atomics: how many are odd.
template <bool kGood>
void odd(const Args& a) {
  for (int i = static_cast<int>(threadIdx.x); i < (a.n + 63) / 64 * 64; i += kThreads) {
    const uint32_t bits = __ballot_sync(0xffffffffu, i < a.n && a.in[i] % 2 != 0);
    if (simt::lane() != 0) continue;
    if (kGood)
      atomicAdd(a.out, __popc(bits));
    else
      *a.out += __popc(bits);
  }
}

enum class Edge { read_behind, read_before, write_behind, write_before };

template <Edge kBug>
void edge(const Args& a) {
  if (threadIdx.x != 0) return;
  if (kBug == Edge::read_behind) *a.out = a.in[a.n];
  if (kBug == Edge::read_before) *a.out = a.in[-1024];
  if (kBug == Edge::write_behind) a.out[1] = 1;
  if (kBug == Edge::write_before) a.out[-1] = 1;
}

using Kernel = void (*)(const Args&);
struct Planted {
  const char* name;
  Kernel kernel;
  bool cooperative = false;
};
const Planted kAll[] = {
    {"tree", tree<Tree::good>},
    {"tree/unfilled", tree<Tree::unfilled>},
    {"tree/no_first_barrier", tree<Tree::no_first>},
    {"tree/no_inner_barrier", tree<Tree::no_inner>},
    {"tree/no_last_barrier", tree<Tree::no_last>},
    {"tree/divergent_barrier", tree<Tree::divergent>},
    {"tree/different_barriers", tree<Tree::different>},
    {"tree/out_of_room", tree<Tree::out_of_room>},
    {"warp", warp<Warp::good>},
    {"warp/lane_left_out", warp<Warp::lane_left_out>},
    {"warp/early_exit", warp<Warp::early_exit>},
    {"warp/beyond", warp<Warp::beyond>},
    {"last", last<Last::good>},
    {"last/no_fence_before", last<Last::no_fence_before>},
    {"last/no_fence_after", last<Last::no_fence_after>},
    {"last/no_barrier", last<Last::no_barrier>},
    {"last/plain_ticket", last<Last::plain_ticket>},
    {"last/everybody", last<Last::everybody>},
    {"grid", grid<Grid::good>, true},
    {"grid/no_barrier", grid<Grid::no_barrier>, true},
    {"grid/no_second_barrier", grid<Grid::no_second>, true},
    {"grid/a_block_leaves", grid<Grid::a_block_leaves>, true},
    {"grid/a_thread_leaves", grid<Grid::a_thread_leaves>, true},
    {"grid/different_barriers", grid<Grid::different>, true},
    {"grid/not_cooperative", grid<Grid::good>},
    {"odd", odd<true>},
    {"odd/plain_addition", odd<false>},
    {"edge/read_behind", edge<Edge::read_behind>},
    {"edge/read_before", edge<Edge::read_before>},
    {"edge/write_behind", edge<Edge::write_behind>},
    {"edge/write_before", edge<Edge::write_before>},
};

}  // namespace

extern "C" {

int planted_count() { return static_cast<int>(sizeof(kAll) / sizeof(kAll[0])); }
const char* planted_name(int i) { return kAll[i].name; }

// Runs one over the numbers 1..n. Returns what is in out[0]; `error` has room for 256 characters.
int planted_run(int i, int n, int blocks, int order, int resident, int races, unsigned seed,
                char* error) {
  simt::options() = {static_cast<simt::Order>(order), seed, resident, races != 0};
  auto* const in = static_cast<int*>(simt::allocate(sizeof(int) * static_cast<size_t>(n), 0, 0));
  auto* const out = static_cast<int*>(simt::allocate(sizeof(int), 0, 0));
  auto* const ticket = static_cast<unsigned*>(simt::allocate(sizeof(unsigned), 0, 0));
  auto* const partial = static_cast<int*>(
      simt::allocate(sizeof(int) * kThreads * static_cast<size_t>(blocks), 0, 0xFF));
  for (int k = 0; k < n; ++k) in[k] = k + 1;
  const Args args{in, out, ticket, partial, n};
  simt::launch(static_cast<unsigned>(blocks), kThreads, kAll[i].cooperative,
               [&] { kAll[i].kernel(args); });
  std::string what = simt::take_error();
  const int result = *out;
  for (void* block : {static_cast<void*>(in), static_cast<void*>(out), static_cast<void*>(ticket),
                      static_cast<void*>(partial)}) {
    if (what.empty()) what = simt::check_surroundings(block);
    simt::release(block);
  }
  std::strncpy(error, what.c_str(), 255);
  return result;
}
}

// CUDA kernels on the host, one fiber per thread: what a kernel source needs in place of nvcc.
//
// A barrier counts who arrived, and lets nobody on before all did; waiting for somebody who never
// comes is an error, and so are threads that meet at different barriers. Shared memory starts as
// NaN. Threads and blocks run in an order of choice, and every order must give the same result.
// Memory lies between pages that cannot be touched, so an access outside is an error. With races
// looked for, every access of a kernel is checked against every other (race.cpp).
//
// Blocks run one after another, several at a time, or all together for a grid barrier. What this
// cannot show: anything about speed, and memory models weaker than fences and atomics in program
// order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {

constexpr unsigned kWarp = 32;

// ---- how kernels are run --------------------------------------------------------------------

enum class Order : int { forward = 0, backward = 1, shuffled = 2 };

struct Options {
  Order order = Order::forward;
  uint64_t seed = 1;
  int resident = 1;  // blocks that run at the same time
  bool races = false;
};
Options& options();

// Runs a kernel. The first thing that goes wrong is kept, and nothing runs any more until it is
// taken away.
void launch(dim3 grid, unsigned threads, bool cooperative, const std::function<void()>& kernel);
std::string take_error();
[[noreturn]] void fail(const std::string& what);  // from a kernel's thread

// ---- memory ---------------------------------------------------------------------------------

// `bytes` at an address that is `offset` modulo 16, as close to the page behind as that allows.
void* allocate(size_t bytes, size_t offset, int fill);
// Empty unless bytes around the block were written.
std::string check_surroundings(void* block);
void release(void* block);
// While it is shut, nothing of the block can be touched: it belongs to another device.
void shut(void* block, bool shut);

// ---- what a thread sees ---------------------------------------------------------------------

struct Place {
  dim3 thread, block, threads, blocks;
};
const Place& place();

void sync_block(int site);
void sync_warp(uint32_t mask, int site);
void sync_grid(int site);
// Every lane of the mask hands in `value` and gets that of lane `source`.
uint64_t exchange(uint32_t mask, uint64_t value, unsigned source, int site);
uint32_t ballot(uint32_t mask, bool vote, int site);
void fence();
void before_atomic(const void* at);
void after_atomic();
// The block's own copy of a shared variable; `key` tells variables apart.
void* shared(const void* key, size_t bytes);

template <class T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}
template <class T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

template <class T, class Change>
T atomically(T* at, Change change) {
  before_atomic(at);
  T old;
  __builtin_memcpy(&old, at, sizeof(T));
  const T now = change(old);
  __builtin_memcpy(at, &now, sizeof(T));
  after_atomic();
  return old;
}

inline unsigned lane() { return place().thread.x % kWarp; }

}  // namespace simt

#define threadIdx (simt::place().thread)
#define blockIdx (simt::place().block)
#define blockDim (simt::place().threads)
#define gridDim (simt::place().blocks)

#define __syncthreads() simt::sync_block(__LINE__)
#define __syncwarp(...) simt::sync_warp(simt::mask_or_all(__VA_ARGS__), __LINE__)
#define __ballot_sync(mask, vote) simt::ballot(mask, vote, __LINE__)
#define __any_sync(mask, vote) (simt::ballot(mask, vote, __LINE__) != 0)
#define __all_sync(mask, vote) (simt::ballot(mask, !(vote), __LINE__) == 0)
#define __shfl_sync(mask, value, source) simt::shuffle(mask, value, source, __LINE__)
#define __shfl_xor_sync(mask, value, by) simt::shuffle(mask, value, simt::lane() ^ (by), __LINE__)
#define __shfl_up_sync(mask, value, by) simt::shuffle_up(mask, value, by, __LINE__)
#define __shfl_down_sync(mask, value, by) simt::shuffle_down(mask, value, by, __LINE__)
#define __threadfence() simt::fence()

namespace simt {
inline uint32_t mask_or_all(uint32_t mask = ~0u) { return mask; }
template <class T>
T shuffle(uint32_t mask, T value, unsigned source, int site) {
  return from_word<T>(exchange(mask, to_word(value), source % kWarp, site));
}
template <class T>
T shuffle_up(uint32_t mask, T value, unsigned by, int site) {
  return shuffle(mask, value, lane() >= by ? lane() - by : lane(), site);
}
template <class T>
T shuffle_down(uint32_t mask, T value, unsigned by, int site) {
  return shuffle(mask, value, lane() + by < kWarp ? lane() + by : lane(), site);
}
}  // namespace simt

// There is no atomic addition of floats: a sum must not depend on who comes first.
template <class T>
T atomicAdd(T* at, T by) {
  static_assert(std::is_integral_v<T>, "sums of floats in an order of chance");
  return simt::atomically(at, [by](T old) { return static_cast<T>(old + by); });
}
template <class T>
T atomicOr(T* at, T bits) {
  return simt::atomically(at, [bits](T old) { return old | bits; });
}
template <class T>
T atomicExch(T* at, T value) {
  return simt::atomically(at, [value](T) { return value; });
}
inline unsigned atomicInc(unsigned* at, unsigned last) {
  return simt::atomically(at, [last](unsigned old) { return old >= last ? 0u : old + 1; });
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(uint32_t x) { return x == 0 ? 32 : __builtin_clz(x); }

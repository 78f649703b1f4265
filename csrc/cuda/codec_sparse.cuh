// Messages about some coordinates: the k largest, or drawn ones. The CPU kernels' choice and bytes.
//
// Digits of the k-th magnitude are found one after another (radix.cuh); of equals the first ones
// are chosen, and zeros where there are no others. Where they go is known from how many a warp's
// 256 elements have; the caller adds these numbers up.
#pragma once

#include "cuda/codec_rounded.cuh"
#include "cuda/radix.cuh"

PYSMOOTH_KERNELS_BEGIN

constexpr int kTile = kWarp * kOctet;  // elements of a warp

PYSMOOTH_DEVICE uint32_t key_at(const float* x, int64_t i) {
  return bits_as<uint32_t>(x[i]) & 0x7fffffffu;
}

// Counts the digits of what see() is handed, over all blocks; the last one settles the digit.
template <class Each>
PYSMOOTH_DEVICE void count_digit(const Coding& c, const Digit& digit, bool begins, Each each) {
  PYSMOOTH_SHARED(Histogram, mine);
  for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kThreads) mine[i] = 0;
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kFoldElements;
  for (int64_t i = first + static_cast<int64_t>(threadIdx.x); i < first + kFoldElements && i < c.n;
       i += kThreads) {
    const int d = each(i);
    if (d >= 0) atomicAdd(&mine[d], 1u);
  }
  __syncthreads();
  unsigned long long* const all = c.state->digits;
  for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kThreads)
    if (mine[i] != 0) atomicAdd(&all[i], static_cast<unsigned long long>(mine[i]));
  if (!last_block(&c.state->arrived, gridDim.x)) return;
  if (begins) {
    if (threadIdx.x == 0) c.state->threshold = {0, 0, c.k, 0};
    // Infinities and NaN begin with the largest digits.
    for (int i = (0x7f800000 >> digit.shift) + static_cast<int>(threadIdx.x); i < kDigits;
         i += kThreads)
      if (all[i] != 0) atomicAdd(&c.state->spoiled, all[i]);
    __syncthreads();
  }
  take_digit(&c.state->threshold, digit, [&](int i) { return uint64_t{all[i]}; });
  for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kThreads) all[i] = 0;
}

// x into `out`, and its first digit.
PYSMOOTH_KERNEL weigh(Coding c) {
  const Digit digit(0, false, 0);
  count_digit(c, digit, true, [&](int64_t i) {
    const float x = value_at(c.source, i);
    c.out[i] = x;
    return static_cast<int>((bits_as<uint32_t>(x) & 0x7fffffffu) >> digit.shift);
  });
}

// Digit `digit` of what is in question.
PYSMOOTH_KERNEL narrow_down(Coding c) {
  const Digit digit(c.digit, false, 0);
  const Threshold held = c.state->threshold;
  count_digit(c, digit, false, [&](int64_t i) { return digit.of(held, key_at(c.out, i), 0); });
}

// The octet's magnitudes; -1 beyond n.
PYSMOOTH_DEVICE void take_keys(const Coding& c, int64_t octet, float* x, int64_t* key) {
  take_octet(c.out, kOctet * octet, c.n, x);
  PYSMOOTH_UNROLL
  for (int j = 0; j < kOctet; ++j)
    key[j] = kOctet * octet + j < c.n ? int64_t{bits_as<uint32_t>(x[j]) & 0x7fffffffu} : -1;
}

// How many of an octet are larger than the k-th, and how many equal to it: in one number, so that
// one sum over a warp is about both.
PYSMOOTH_DEVICE uint32_t tally(const int64_t* key, int64_t last) {
  uint32_t both = 0;
  PYSMOOTH_UNROLL
  for (int j = 0; j < kOctet; ++j) both += key[j] > last ? 1u << 16 : key[j] == last ? 1u : 0u;
  return both;
}

// What lanes before this one have; `all`: what the warp has.
PYSMOOTH_DEVICE uint32_t sum_before(uint32_t mine, uint32_t* all) {
  uint32_t sum = mine;
  for (int by = 1; by < kWarp; by *= 2) {
    const uint32_t other = __shfl_up_sync(kEveryLane, sum, by);
    if (lane_id() >= by) sum += other;
  }
  *all = __shfl_sync(kEveryLane, sum, kWarp - 1);
  return sum - mine;
}

PYSMOOTH_DEVICE int64_t tiles_of(const Coding& c) { return (c.n + kTile - 1) / kTile; }

PYSMOOTH_KERNEL count_chosen(Coding c) {
  const int64_t tile = warp_number();
  if (tile >= tiles_of(c)) return;
  float x[kOctet];
  int64_t key[kOctet];
  take_keys(c, octet_number(), x, key);
  uint32_t all;
  sum_before(tally(key, static_cast<int64_t>(c.state->threshold.key)), &all);
  if (lane_id() != 0) return;
  c.counts[tile] = all >> 16;
  c.counts[tiles_of(c) + tile] = all & 0xffffu;
}

// Of counts that were added up: how many there are before a warp's elements.
PYSMOOTH_DEVICE int64_t before(const int64_t* ends, int64_t tile) {
  return tile == 0 ? 0 : ends[tile - 1];
}

// Values of the chosen ones, where they are, and nothing left of them.
PYSMOOTH_KERNEL emit(Coding c) {
  const int64_t tile = warp_number(), octet = octet_number(), first = kOctet * octet;
  if (tile >= tiles_of(c)) return;
  const auto last = static_cast<int64_t>(c.state->threshold.key);
  const int64_t left = c.state->threshold.left;
  float x[kOctet];
  int64_t key[kOctet];
  take_keys(c, octet, x, key);
  uint32_t all;
  const uint32_t mine = sum_before(tally(key, last), &all);
  int64_t equals = before(c.counts + tiles_of(c), tile) + (mine & 0xffffu);
  int64_t place = before(c.counts, tile) + (mine >> 16) + (equals < left ? equals : left);
  uint32_t marks = 0;
  PYSMOOTH_UNROLL
  for (int j = 0; j < kOctet; ++j) {
    const bool equal = key[j] == last, chosen = key[j] > last || (equal && equals < left);
    if (equal) ++equals;
    if (!chosen) continue;
    put_float(c.message + c.room + 4 * place, x[j]);
    if (c.index != nullptr) c.index[place] = first + j;
    c.out[first + j] = 0.0f;
    marks |= 1u << j;
    ++place;
  }
  if (c.index == nullptr && first < c.n) c.message[octet] = static_cast<uint8_t>(marks);
}

// Numbers of `width` bits, eight of them to a thread.
PYSMOOTH_KERNEL pack_numbers(Coding c) {
  const int64_t octet = octet_number();
  if (kOctet * octet >= c.k) return;
  BitWriter writer{c.message + octet * c.width};
  for (int64_t j = kOctet * octet; j < kOctet * octet + kOctet && j < c.k; ++j)
    writer.put(static_cast<uint64_t>(c.index[j]), c.width);
  writer.flush();
}

// One rank's values are added where its message says: eight places to a thread.
PYSMOOTH_KERNEL scatter(Coding c) {
  const int64_t octet = octet_number();
  if (kOctet * octet >= c.k) return;
  BitReader reader{c.messages + octet * c.width};
  for (int64_t j = kOctet * octet; j < kOctet * octet + kOctet && j < c.k; ++j) {
    const auto where = static_cast<int64_t>(reader.take(c.width));
    c.out[where] = c.out[where] + float_at(c.messages + c.room + 4 * j);
  }
}

// The bits of a warp's bytes, of rank after rank.
PYSMOOTH_KERNEL count_marks(Coding c) {
  const int64_t tiles = tiles_of(c), number = warp_number();
  if (number >= c.ranks * tiles) return;
  const int64_t byte = number % tiles * kWarp + lane_id();
  const uint8_t* const row = c.messages + number / tiles * c.stride;
  uint32_t all;
  sum_before(byte < c.room ? static_cast<uint32_t>(__popc(row[byte])) : 0u, &all);
  if (lane_id() == 0) c.counts[number] = all;
}

// Sums over ranks, in their order: the next value wherever a bit is set.
PYSMOOTH_KERNEL spread(Coding c) {
  const int64_t tile = warp_number(), octet = octet_number(), tiles = tiles_of(c);
  if (tile >= tiles) return;
  float sum[kOctet] = {};
  for (int r = 0; r < c.ranks; ++r) {
    const uint8_t* const row = c.messages + r * c.stride;
    const uint32_t bits = octet < c.room ? row[octet] : 0u;
    uint32_t all;
    int64_t place =
        before(c.counts + r * tiles, tile) + sum_before(static_cast<uint32_t>(__popc(bits)), &all);
    PYSMOOTH_UNROLL
    for (int j = 0; j < kOctet; ++j)
      if ((bits >> j & 1u) != 0 && place < c.k) sum[j] += float_at(row + c.room + 4 * place++);
  }
  if (kOctet * octet < c.n) give_sum(c, octet, sum);
}

// ---- coordinates that are drawn

PYSMOOTH_KERNEL combine(Coding c) {
  const int64_t octet = octet_number();
  if (kOctet * octet >= c.n) return;
  float x[kOctet];
  evaluate(c, octet, x);
  give_octet(c.out, kOctet * octet, c.n, x);
}

PYSMOOTH_DEVICE int64_t drawn_place(const Coding& c, int64_t j) {
  const Permutation places(static_cast<uint64_t>(c.n), c.seed, c.step, c.tensor);
  return static_cast<int64_t>(places(static_cast<uint64_t>(j)));
}

// The chosen ones, times a factor; what is left of them stays.
PYSMOOTH_KERNEL pick_drawn(Coding c) {
  const int64_t j = octet_number();
  if (j >= c.k) return;
  float* const where = c.out + drawn_place(c, j);
  const float kept = *where, sent = kept * c.factor;
  put_float(c.message + 4 * j, sent);
  *where = kept - sent;
}

// One rank's values are added where it has drawn.
PYSMOOTH_KERNEL drop_drawn(Coding c) {
  const int64_t j = octet_number();
  if (j >= c.k) return;
  float* const where = c.out + drawn_place(c, j);
  *where = *where + float_at(c.messages + 4 * j);
}

PYSMOOTH_KERNELS_END

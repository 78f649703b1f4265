// Random numbers that depend on nothing but where they are used: Philox4x32-10 (Salmon et al.,
// SC 2011), and permutations keyed by it. The same on every backend, thread and rank.
#pragma once

#include <cstdint>

#include "core/config.h"

namespace pysmooth {

// Four words, or four vectors of them.
template <class U>
struct WordsOf {
  U word[4];
};
using Words = WordsOf<uint32_t>;

// A product in full: its lower word, and the upper one.
struct Multiply {
  PYSMOOTH_HD uint32_t operator()(uint32_t a, uint32_t b, uint32_t* upper) const {
    const uint64_t product = uint64_t{a} * b;
    *upper = static_cast<uint32_t>(product >> 32);
    return static_cast<uint32_t>(product);
  }
};

template <class U, class Product = Multiply>
PYSMOOTH_HD WordsOf<U> philox(WordsOf<U> counter, uint32_t key0, uint32_t key1,
                              Product multiply = {}) {
  for (int round = 0; round < 10; ++round) {
    U upper_a, upper_b;
    const U a = multiply(counter.word[0], 0xD2511F53u, &upper_a);
    const U b = multiply(counter.word[2], 0xCD9E8D57u, &upper_b);
    counter = {{upper_b ^ counter.word[1] ^ key0, b, upper_a ^ counter.word[3] ^ key1, a}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// The words of elements 4 b to 4 b + 3 come from the counter (b, step, tensor). Where an element
// needs 64 bits the lower half comes from a second word, of tensor + kSecondWord.
constexpr uint32_t kSecondWord = 1u << 31;

PYSMOOTH_HD uint32_t mix32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

// What stochastic rounding adds, for one element or a vector of them: 32 bits from (step, tensor),
// made into two keys, and the element's index. Cheaper than philox, and for nothing else.
struct NoiseKey {
  uint32_t first = 0, second = 0;

  NoiseKey() = default;
  PYSMOOTH_HD NoiseKey(uint32_t step, uint32_t tensor) {
    const Words words = philox(Words{{0, 0, step, tensor}}, 0x6A09E667u, 0xBB67AE85u);
    first = words.word[0];
    second = words.word[1];
  }

  // Another key, for what is rounded in the same step by itself: pairs of operands by their number,
  // what a pass before apply leaves by kNoisePass more for each.
  PYSMOOTH_HD NoiseKey shifted(int by) const {
    NoiseKey out = *this;
    out.first += 0x9E3779B9u * static_cast<uint32_t>(by);
    return out;
  }
};

// More than any step has pairs of operands.
constexpr int kNoisePass = 4;

// `place` is the element's index times kNoiseStride: a walk adds it up.
constexpr uint32_t kNoiseStride = 0x9E3779B9u;

template <class U>
PYSMOOTH_HD U noise(U place, NoiseKey key) {
  U x = place ^ key.first;
  x = (x ^ (x >> 16)) * 0x7feb352du + key.second;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// A permutation of [0, size), drawn by seed, step and tensor: a Feistel network of six rounds over
// the next power of four, walked until it is back inside.
class Permutation {
 public:
  PYSMOOTH_HD Permutation(uint64_t size, uint64_t seed, uint32_t step, uint32_t tensor)
      : size_(size) {
    int bits = 1;
    while (bits < 64 && (uint64_t{1} << bits) < size) ++bits;
    half_ = (bits + 1) / 2;
    mask_ = half_ == 32 ? ~0u : (1u << half_) - 1u;
    const auto key0 = static_cast<uint32_t>(seed) ^ 0x9E3779B9u;
    const auto key1 = static_cast<uint32_t>(seed >> 32);
    for (uint32_t block = 0; block < 2; ++block) {
      const Words words = philox(Words{{block, 0, step, tensor}}, key0, key1);
      for (uint32_t i = 0; i < 4 && 4 * block + i < 6; ++i) key_[4 * block + i] = words.word[i];
    }
  }

  PYSMOOTH_HD uint64_t operator()(uint64_t index) const {
    do {
      auto left = static_cast<uint32_t>(index >> half_) & mask_;
      auto right = static_cast<uint32_t>(index) & mask_;
      for (const uint32_t key : key_) {
        const uint32_t next = left ^ (mix32(right ^ key) & mask_);
        left = right;
        right = next;
      }
      index = uint64_t{left} << half_ | right;
    } while (index >= size_);
    return index;
  }

 private:
  uint64_t size_;
  int half_;
  uint32_t mask_;
  uint32_t key_[6];
};

}  // namespace pysmooth

// What a rule draws for each element, the CPU backend's bits (cpu/draw.cpp): four elements share
// the words of one call of philox, and a thread keeps those it used last.
#pragma once

#include "core/math/normal.h"
#include "cuda/device.cuh"

PYSMOOTH_KERNELS_BEGIN

template <class C>
class Drawer {
 public:
  PYSMOOTH_DEVICE Drawer(const Prepared& prepared, int tensor)
      : draw_(prepared.draw), step_(prepared.step), tensor_(static_cast<uint32_t>(tensor)) {}

  // For the element at `index`, in the order that the tensor is walked in.
  PYSMOOTH_DEVICE C operator()(int64_t index) {
    if (draw_.kind == Draw::none) return C(0);
    if (index / 4 != block_) refill(index / 4);
    const uint32_t word = pick(words_, index);
    if (draw_.kind == Draw::normal || sizeof(C) == 4) return static_cast<C>(bits_as<float>(word));
    const uint64_t bits = uint64_t{word} << 32 | pick(lower_, index);
    return static_cast<C>(bits_as<double>(bits));
  }

 private:
  // Without an index into registers.
  PYSMOOTH_DEVICE static uint32_t pick(const Words& x, int64_t index) {
    const bool odd = index % 2 != 0;
    return index % 4 < 2 ? (odd ? x.word[1] : x.word[0]) : (odd ? x.word[3] : x.word[2]);
  }
  PYSMOOTH_DEVICE Words words(uint32_t second) const {
    return philox(Words{{static_cast<uint32_t>(block_), static_cast<uint32_t>(block_ >> 32), step_,
                         tensor_ | second}},
                  static_cast<uint32_t>(draw_.seed), static_cast<uint32_t>(draw_.seed >> 32));
  }
  PYSMOOTH_DEVICE void refill(int64_t block) {
    block_ = block;
    words_ = words(0);
    if (draw_.kind == Draw::normal) {
      PYSMOOTH_UNROLL
      for (int j = 0; j < 4; j += 2) {
        float across, along;
        box_muller<float>(words_.word[j], words_.word[j + 1], &across, &along);
        words_.word[j] = bits_as<uint32_t>(across);
        words_.word[j + 1] = bits_as<uint32_t>(along);
      }
    } else if (sizeof(C) == 8) {
      lower_ = words(kSecondWord);
    }
  }

  const Draw draw_;
  const uint32_t step_, tensor_;
  int64_t block_ = -1;
  Words words_ = {}, lower_ = {};
};

PYSMOOTH_KERNELS_END

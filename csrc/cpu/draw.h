// What a rule draws for each element: words of philox, or normal numbers made of them, a run at a
// time. They depend on where an element is in the order that its tensor is walked in, and not on
// how the walk is cut up.
#pragma once

#include "cpu/staging.h"

PYSMOOTH_KERNELS_BEGIN

template <class C, bool kDraws>
class Drawing {
 public:
  PYSMOOTH_HD Drawing(const ApplyArgs& args, Draw draw) : args_(args), draw_(draw) {}

  // The longest run.
  int64_t most(int64_t unless_drawn) const {
    return draw_.kind == Draw::none ? unless_drawn : kStagedElements;
  }
  // For the next `count` elements of the chunk; null where nothing is drawn.
  PYSMOOTH_HD const C* next(int64_t count) {
    if (draw_.kind == Draw::none) return nullptr;
    const int64_t first = args_.begin + done_;
    done_ += count;
    fill(first, count);
    return room_ + first % 4;
  }

 private:
  void fill(int64_t first, int64_t count);

  const ApplyArgs& args_;
  const Draw draw_;
  int64_t done_ = 0;
  // From a multiple of four on, in steps of four vectors.
  alignas(64) C room_[kStagedElements + 4 + 4 * kFloats];
};

// Of rules that never draw.
template <class C>
class Drawing<C, false> {
 public:
  PYSMOOTH_HD Drawing(const ApplyArgs&, Draw) {}
  PYSMOOTH_HD int64_t most(int64_t limit) const { return limit; }
  PYSMOOTH_HD const C* next(int64_t) { return nullptr; }
};

PYSMOOTH_KERNELS_END

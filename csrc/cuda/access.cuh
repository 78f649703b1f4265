// How a thread holds a group of neighbouring elements of every operand, and moves them to and from
// memory in 16-byte words.
//
// Groups start at 16-byte boundaries. Where operands disagree about those, where they are strided,
// and at the ends of a run, elements come one by one. Loading is apart from making numbers of what
// was loaded, so that all loads of a turn are under way before anything waits for one.
#pragma once

#include "core/param_storage.h"
#include "cuda/draw.cuh"
#include "cuda/fold.cuh"
#include "cuda/layout.cuh"

PYSMOOTH_KERNELS_BEGIN

template <class C_, int kGroup_, bool kPlain_>
struct AccessOf {
  using C = C_;
  static constexpr int kGroup = kGroup_;   // elements that a thread holds
  static constexpr bool kPlain = kPlain_;  // every operand is stored as C
  static constexpr int kWords = kGroup * static_cast<int>(sizeof(C)) / 4;  // of 4 bytes, at most
};
using PlainAccess = AccessOf<float, 4, true>;
using MixedAccess = AccessOf<float, 8, false>;  // 16-bit elements fill a 16-byte word, floats two
using WideAccess = AccessOf<double, 4, false>;  // doubles fill two, a float gradient's one

// The part of a tensor that a team walks over, row by row, and where its operands are.
template <class Rule, class A>
struct Span {
  static constexpr int kOperands = 2 + Rule::kStates;
  // A 16-bit parameter may have a companion (core/param_storage.h): it comes after the rule's own.
  static constexpr bool kPairs = !A::kPlain && sizeof(typename A::C) == 4;
  static constexpr int kCompanion = kOperands;
  static constexpr int kAll = kOperands + (kPairs ? 1 : 0);

  char* base[kAll];
  const View& plan;
  const Entry& entry;
  const Layout* layout;
  int64_t begin = 0, length = 0;
  int head = 0;          // elements before the first 16-byte boundary: they are row -1
  int end_row = 0;       // the same for all teams of a warp
  bool vectors = false;  // groups lie on 16-byte boundaries in every operand

  PYSMOOTH_DEVICE Span(const View& plan_, int t, unsigned touched)
      : plan(plan_),
        entry(plan.entries[t]),
        layout(entry.layout < 0 ? nullptr : plan.layouts + entry.layout) {
    auto* const grad = static_cast<char*>(const_cast<void*>(plan.grads[t]));
    if (companion()) touched |= 1u << kCompanion;
    PYSMOOTH_UNROLL
    for (int k = 0; k < kAll; ++k) base[k] = k == 1 ? grad : static_cast<char*>(entry.operand[k]);
    if (!Rule::kReadsGrad && base[0] == nullptr) base[0] = grad;
    if (layout != nullptr) return;
    // Signs are kept by where a thread meets them, which must be the same in every kernel.
    if (!Rule::kSendsSigns) {
      int smallest = 16;
      PYSMOOTH_UNROLL
      for (int k = 0; k < kAll; ++k) {
        if (!has(touched, k) || size_of(k) >= smallest) continue;
        smallest = size_of(k);
        head = static_cast<int>((16 - reinterpret_cast<uintptr_t>(base[k]) % 16) % 16) / smallest;
      }
    }
    vectors = true;
    PYSMOOTH_UNROLL
    for (int k = 0; k < kAll; ++k)
      if (has(touched, k)) {
        const auto at = reinterpret_cast<uintptr_t>(base[k]);
        vectors = vectors && (at + static_cast<unsigned>(head * size_of(k))) % 16 == 0;
      }
  }

  // The team's part of item `part` of the tensor; `rows` rows of 64 elements each.
  PYSMOOTH_DEVICE void take_part(int part, int rows) { take_run(part, rows, 0, rows * kRow); }
  // Of that, `most` elements from `from` on: a multiple of 64.
  PYSMOOTH_DEVICE void take_run(int part, int rows, int from, int most) {
    using Us = Team<A::kGroup>;
    const int64_t each = int64_t{rows} * kRow;
    const int64_t first = part * Us::kTeams * each + from;
    const Us me;
    begin = first + me.team * each;
    length = clamped(entry.numel - begin, most);
    // All teams of a warp take as many turns as the first one, which has the most to do.
    const int64_t longest = clamped(entry.numel - first, most);
    end_row = longest > head ? static_cast<int>((longest - head + kRow - 1) / kRow) : 0;
  }

  PYSMOOTH_DEVICE DType dtype(int k) const {
    if constexpr (A::kPlain) return DType::f32;
    return static_cast<DType>(entry.dtype[k]);
  }
  PYSMOOTH_DEVICE ParamStorage storage() const {
    return kPairs ? static_cast<ParamStorage>(entry.storage) : ParamStorage::plain;
  }
  PYSMOOTH_DEVICE bool by_rows() const { return entry.cut >= 0; }
  PYSMOOTH_DEVICE bool companion() const { return has_companion(storage()); }
  PYSMOOTH_DEVICE int size_of(int k) const { return itemsize(dtype(k)); }
  PYSMOOTH_DEVICE static int64_t clamped(int64_t left, int64_t most) {
    return left < 0 ? 0 : left < most ? left : most;
  }
};

// What neighbouring elements are multiplied by where a gradient is clipped by rows, one after the
// other.
template <class C>
class RowFactors {
 public:
  // From the element at `index` on, in the order that the tensor is walked in.
  template <class Rule, class A>
  PYSMOOTH_DEVICE void begin(const Span<Rule, A>& span, int64_t index) {
    const RowCut& cut = span.plan.cuts[span.entry.cut];
    const int64_t runs = index / cut.run;
    at_ = first(span.plan, cut) + runs % cut.rows;
    left_ = cut.run - (index - runs * cut.run);
  }
  template <class Rule, class A>
  PYSMOOTH_DEVICE C next(const Span<Rule, A>& span) {
    const C out = *at_;
    if (--left_ == 0) {
      const RowCut& cut = span.plan.cuts[span.entry.cut];
      const C* const begin = first(span.plan, cut);
      at_ = at_ + 1 == begin + cut.rows ? begin : at_ + 1;
      left_ = cut.run;
    }
    return out;
  }

 private:
  PYSMOOTH_DEVICE static const C* first(const View& plan, const RowCut& cut) {
    return reinterpret_cast<const C*>(plan.row_coefs + cut.first_coef);
  }
  const C* at_ = nullptr;
  int64_t left_ = 0;
};

// Marks of a selection: bit index % 32 of word index / 32, in the order that the tensor is walked
// in; one set of words after the other.
PYSMOOTH_DEVICE uint32_t* marks_of(const View& plan, const Entry& e, int selection) {
  return plan.marks + e.first_mark + selection * ((e.numel + 31) / 32);
}

// Those of at most 32 neighbouring elements, of the selections in kSets.
template <unsigned kSets>
struct Marked {
  uint32_t bits[kMaxSelections] = {};

  PYSMOOTH_DEVICE Marked(const View& plan, const Entry& e, int64_t index, int count) {
    if (e.first_mark < 0) return;
    const auto shift = static_cast<int>(index % 32);
    PYSMOOTH_UNROLL
    for (int k = 0; k < kMaxSelections; ++k) {
      if (!has(kSets, k)) continue;
      const uint32_t* const at = marks_of(plan, e, k) + index / 32;
      bits[k] = at[0] >> shift;
      if (shift + count > 32) bits[k] |= at[1] << (32 - shift);
    }
  }
  template <class C, int kStates>
  PYSMOOTH_DEVICE void give(Lane<C, kStates>* x, int j) const {
    PYSMOOTH_UNROLL
    for (int k = 0; k < kMaxSelections; ++k)
      if (has(kSets, k)) x->marked[k] = (bits[k] >> j & 1u) != 0 ? C(1) : C(0);
  }
};

// ---- 16-byte words
// ----------------------------------------------------------------------------------

template <class A>
struct Raw {
  uint32_t word[A::kWords];
};

template <class A>
PYSMOOTH_DEVICE Raw<A> take_words(const char* at, int words) {
  Raw<A> out;
  PYSMOOTH_UNROLL
  for (int w = 0; w < A::kWords; w += 4)
    if (w < words) {
      const uint4 x = *reinterpret_cast<const uint4*>(at + 4 * w);
      out.word[w] = x.x;
      out.word[w + 1] = x.y;
      out.word[w + 2] = x.z;
      out.word[w + 3] = x.w;
    }
  return out;
}

template <class A>
PYSMOOTH_DEVICE void give_words(char* at, int words, const Raw<A>& in) {
  PYSMOOTH_UNROLL
  for (int w = 0; w < A::kWords; w += 4)
    if (w < words)
      *reinterpret_cast<uint4*>(at + 4 * w) =
          uint4{in.word[w], in.word[w + 1], in.word[w + 2], in.word[w + 3]};
}

// Element j as a number, and back.
template <class A>
PYSMOOTH_DEVICE typename A::C number(const Raw<A>& raw, DType dtype, int j) {
  if constexpr (A::kPlain) {
    return bits_as<float>(raw.word[j]);
  } else if constexpr (sizeof(typename A::C) == 8) {
    if (dtype == DType::f32) return static_cast<double>(bits_as<float>(raw.word[j]));
    return bits_as<double>(uint64_t{raw.word[2 * j]} | uint64_t{raw.word[2 * j + 1]} << 32);
  } else {
    if (dtype == DType::f32) return bits_as<float>(raw.word[j]);
    return decode16((raw.word[j / 2] >> 16 * (j % 2)) & 0xffffu, dtype);
  }
}

// The neighbour's bits stay: it may not have been read yet.
template <class A>
PYSMOOTH_DEVICE void put_half(Raw<A>* raw, int j, uint32_t bits) {
  const uint32_t held = raw->word[j / 2];
  raw->word[j / 2] = j % 2 == 0 ? (held & 0xffff0000u) | bits : (held & 0xffffu) | bits << 16;
}

// What is written is stored as C, or narrower.
template <class A>
PYSMOOTH_DEVICE void put_number(Raw<A>* raw, DType dtype, int j, typename A::C x) {
  if constexpr (A::kPlain) {
    raw->word[j] = bits_as<uint32_t>(x);
  } else if constexpr (sizeof(typename A::C) == 8) {
    const auto bits = bits_as<uint64_t>(x);
    raw->word[2 * j] = static_cast<uint32_t>(bits);
    raw->word[2 * j + 1] = static_cast<uint32_t>(bits >> 32);
  } else if (dtype == DType::f32) {
    raw->word[j] = bits_as<uint32_t>(x);
  } else {
    put_half(raw, j, encode16(x, dtype));
  }
}

// ---- groups and single elements
// ---------------------------------------------------------------------

// 16 bits, rounded up or down by chance, where the operand asks for that. `index`: of the element,
// in the order that the tensor is walked in.
PYSMOOTH_DEVICE uint32_t rounded_by_chance(const Entry& entry, int k, float x, int64_t index,
                                           NoiseKey key) {
  const int turn = turn_of(entry.stochastic, k);
  const uint32_t random = noise(static_cast<uint32_t>(index) * kNoiseStride, key.shifted(turn / 2));
  return round_bf16_stochastic<uint32_t>(x, (random >> noise_shift(turn)) & 0xffffu) >> 16;
}

PYSMOOTH_DEVICE float rounded16(float x, DType dtype) {
  return decode16(encode16(x, dtype), dtype);
}

// Kahan's: what the parameter and its companion hold of x. Stored is what this rounds to.
struct Kept {
  float param, rest;
  PYSMOOTH_DEVICE Kept(float x, DType dtype) {
    const float q = rounded16(x, dtype);
    param = q - q == 0.0f ? q + rounded16(x - q, dtype) : x;
    const float p = rounded16(param, dtype);
    rest = p - p == 0.0f ? param - p : 0.0f;
  }
};

template <class Rule, class A, class Use>
struct Port {
  using Access = A;
  using C = typename A::C;
  static constexpr int kGroup = A::kGroup;
  using Element = Lane<C, Rule::kStates>;
  using Where = Span<Rule, A>;
  static constexpr int kOperands = Where::kOperands, kAll = Where::kAll;
  static constexpr int kCompanion = Where::kCompanion;
  static constexpr Touch kUse = touch_of<Rule>(Use::kStreams);
  static constexpr unsigned kTouched = kUse.reads | kUse.writes;
  static constexpr bool kDraws = Use::kStreams.draws;
  static constexpr unsigned kMarks = Use::kStreams.marks;
  static constexpr int kClipped = Rule::kReadsGrad ? 1 : 0;  // what rows' factors are for

  PYSMOOTH_DEVICE static C& part(Element& x, int k) {
    return k == 0 ? x.param : k == 1 ? x.grad : x.state[k < 2 ? 0 : k - 2];
  }
  PYSMOOTH_DEVICE static bool reads(const Where& span, int k, bool reads_param) {
    const bool needs =
        k == 0 || k == kCompanion ? has(kUse.reads, 0) && reads_param : has(kUse.reads, k);
    return needs && (k != kCompanion || span.storage() == ParamStorage::kahan);
  }
  PYSMOOTH_DEVICE static bool writes(const Where& span, int k) {
    return k == kCompanion ? has(kUse.writes, 0) && span.companion() : has(kUse.writes, k);
  }
  // Whether operand k is rounded by chance, where anything can be.
  PYSMOOTH_DEVICE static bool by_chance(const Where& span, int k) {
    return Where::kPairs && has(span.entry.stochastic, k);
  }

  // What becomes of an element as it is written, operand by operand.
  struct Parts {
    C value[kAll];
    PYSMOOTH_DEVICE Parts(const Where& span, Element& x) {
      PYSMOOTH_UNROLL
      for (int k = 0; k < kOperands; ++k) value[k] = part(x, k);
      if constexpr (Where::kPairs) {
        value[kCompanion] = x.param;  // a master's 16-bit copy
        if (has(kUse.writes, 0) && span.storage() == ParamStorage::kahan) {
          const Kept kept(x.param, span.dtype(0));
          value[0] = kept.param;
          value[kCompanion] = kept.rest;
        }
      }
    }
  };

  // A group, whole and on 16-byte boundaries; `at` in the span.
  Raw<A> raw[kAll];

  PYSMOOTH_DEVICE void load(const Where& span, int64_t at, bool reads_param) {
    PYSMOOTH_UNROLL
    for (int k = 0; k < kAll; ++k)
      if (reads(span, k, reads_param)) {
        const int size = span.size_of(k);
        raw[k] = take_words<A>(span.base[k] + (span.begin + at) * size, A::kGroup * size / 4);
      }
  }
  PYSMOOTH_DEVICE Element element(const Where& span, int j, bool reads_param) const {
    Element x{};
    PYSMOOTH_UNROLL
    for (int k = 0; k < kOperands; ++k)
      if (reads(span, k, reads_param)) part(x, k) = number(raw[k], span.dtype(k), j);
    if constexpr (Where::kPairs)
      if (reads(span, kCompanion, reads_param))
        x.param += number(raw[kCompanion], span.dtype(kCompanion), j);
    return x;
  }
  PYSMOOTH_DEVICE void put(const Where& span, Element& x, int j, int64_t index, NoiseKey key) {
    const Parts parts(span, x);
    PYSMOOTH_UNROLL
    for (int k = 0; k < kAll; ++k) {
      if (!writes(span, k)) continue;
      if constexpr (Where::kPairs)
        if (by_chance(span, k)) {
          put_half(&raw[k], j, rounded_by_chance(span.entry, k, parts.value[k], index, key));
          continue;
        }
      put_number(&raw[k], span.dtype(k), j, parts.value[k]);
    }
  }
  PYSMOOTH_DEVICE void store(const Where& span, int64_t at) const {
    PYSMOOTH_UNROLL
    for (int k = 0; k < kAll; ++k)
      if (writes(span, k)) {
        const int size = span.size_of(k);
        give_words(span.base[k] + (span.begin + at) * size, A::kGroup * size / 4, raw[k]);
      }
  }

  // A single element, wherever it is; `index` as above.
  char* where[kAll];

  PYSMOOTH_DEVICE Element load_one(const Where& span, const GradientIn<C>& take, int64_t index,
                                   bool reads_param) {
    int64_t offset[kAll];
    if (span.layout != nullptr) offsets_of(*span.layout, index, offset);
    Element x{};
    PYSMOOTH_UNROLL
    for (int k = 0; k < kAll; ++k) {
      where[k] = span.base[k] + (span.layout == nullptr ? index : offset[k]) * span.size_of(k);
      if (!reads(span, k, reads_param)) continue;
      const C value = load_as<C>(where[k], span.dtype(k));
      if (k == kCompanion)
        x.param += value;
      else
        part(x, k) = value;
    }
    if (has(kUse.reads, kClipped) && span.by_rows()) {
      RowFactors<C> rows;
      rows.begin(span, index);
      part(x, kClipped) *= rows.next(span);
    }
    if (has(kUse.reads, 1)) x.grad = take(x.grad);
    return x;
  }
  PYSMOOTH_DEVICE void store_one(const Where& span, Element& x, int64_t index, NoiseKey key) const {
    const Parts parts(span, x);
    PYSMOOTH_UNROLL
    for (int k = 0; k < kAll; ++k) {
      if (!writes(span, k)) continue;
      if constexpr (Where::kPairs)
        if (by_chance(span, k)) {
          *reinterpret_cast<uint16_t*>(where[k]) =
              static_cast<uint16_t>(rounded_by_chance(span.entry, k, parts.value[k], index, key));
          continue;
        }
      store_as<C>(where[k], span.dtype(k), parts.value[k]);
    }
  }
};

// A tensor's constants, as prepare left them.
template <class Rule, class C>
struct Constants {
  using Hyper = typename Rule::template Hyper<C>;
  Hyper hyper;
  GradientIn<C> take;
  PYSMOOTH_DEVICE explicit Constants(const Prepared& p)
      : hyper(*reinterpret_cast<const Hyper*>(p.hyper)),
        take(*reinterpret_cast<const GradientIn<C>*>(p.take)) {}
};

// How many groups of every operand are under way at once, per thread: some 256 bytes; half of that
// where numbers take more registers than what is loaded.
constexpr int bits_in(unsigned set) { return set == 0 ? 0 : 1 + bits_in(set & (set - 1u)); }
template <class A>
constexpr int turns_of(unsigned read) {
  const int turns = (A::kPlain ? 256 : 128) / (4 * A::kWords * (read == 0 ? 1 : bits_in(read)));
  return turns >= 4 ? 4 : turns >= 2 ? 2 : 1;
}

// kTurns groups of the thread, whole and on 16-byte boundaries.
template <int kTurns, bool kByRows, class P, class Body>
PYSMOOTH_DEVICE void take_groups(const typename P::Where& span,
                                 const GradientIn<typename P::C>& take,
                                 Drawer<typename P::C>* drawer, NoiseKey key, bool reads_param,
                                 int row, int64_t at, Body body) {
  P port[kTurns];
  PYSMOOTH_UNROLL
  for (int u = 0; u < kTurns; ++u) port[u].load(span, at + u * kRow, reads_param);
  PYSMOOTH_UNROLL
  for (int u = 0; u < kTurns; ++u) {
    RowFactors<typename P::C> factors;
    if (kByRows) factors.begin(span, span.begin + at + u * kRow);
    const Marked<P::kMarks> marked(span.plan, span.entry, span.begin + at + u * kRow, P::kGroup);
    PYSMOOTH_UNROLL
    for (int j = 0; j < P::kGroup; ++j) {
      const int64_t index = span.begin + at + u * kRow + j;
      auto x = port[u].element(span, j, reads_param);
      if (kByRows) P::part(x, P::kClipped) *= factors.next(span);
      if (has(P::kUse.reads, 1)) x.grad = take(x.grad);
      if constexpr (P::kDraws) x.drawn = (*drawer)(index);
      marked.give(&x, j);
      body(x, row + u, j, true, index);
      port[u].put(span, x, j, index, key);
    }
    port[u].store(span, at + u * kRow);
  }
}

// Takes every element of the warp's item through body(x, row, j, there, index): element j of the
// thread's group in a row. What body makes of x is stored. All lanes of the warp come to every
// (row, j) together; for those that have no element there `there` is false.
template <class P, class Body>
PYSMOOTH_DEVICE void walk(const typename P::Where& span, const GradientIn<typename P::C>& take,
                          Drawer<typename P::C> drawer, NoiseKey key, bool reads_param, Body body) {
  constexpr int kGroup = P::kGroup, kTurns = turns_of<typename P::Access>(P::kUse.reads);
  // One turn at a time: factors would take registers from all others.
  const bool by_rows = has(P::kUse.reads, P::kClipped) && span.by_rows();
  const int turns = by_rows ? 1 : kTurns;
  const int first = span.head + kGroup * Team<kGroup>().member;  // in a row
  int row = span.head > 0 ? -1 : 0;
  while (row < span.end_row) {
    const int64_t at = int64_t{row} * kRow + first;
    const bool whole = span.vectors && at >= 0 && at + (turns - 1) * kRow + kGroup <= span.length;
    if (__all_sync(kEveryLane, whole)) {
      if (by_rows)
        take_groups<1, true, P>(span, take, &drawer, key, reads_param, row, at, body);
      else
        take_groups<kTurns, false, P>(span, take, &drawer, key, reads_param, row, at, body);
      row += turns;
      continue;
    }
    PYSMOOTH_ROLLED
    for (int j = 0; j < kGroup; ++j) {
      P port;
      const bool there = at + j >= 0 && at + j < span.length;
      typename P::Element x{};
      if (there) x = port.load_one(span, take, span.begin + at + j, reads_param);
      if constexpr (P::kDraws)
        if (there) x.drawn = drawer(span.begin + at + j);
      if constexpr (P::kMarks != 0)
        if (there) Marked<P::kMarks>(span.plan, span.entry, span.begin + at + j, 1).give(&x, 0);
      body(x, row, j, there, span.begin + at + j);
      if (there) port.store_one(span, x, span.begin + at + j, key);
    }
    ++row;
  }
}

PYSMOOTH_KERNELS_END

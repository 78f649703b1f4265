#include "cpu/staging.h"

#include <cstring>
#include <type_traits>

#include "cpu/walk.h"

PYSMOOTH_KERNELS_BEGIN

// ---- runs in memory and in a buffer, element by element or in vectors ---------------------------

template <class C, class T>
constexpr bool kInVectors = sizeof(C) == 4 ? sizeof(T) <= 4 : sizeof(T) >= 4;

template <class C, class T>
void load_run(C* out, const T* in, int64_t stride, int64_t n) {
  int64_t i = 0;
  if constexpr (kInVectors<C, T>)
    if (stride == 1)
      for (; i + lanes_of<C> <= n; i += lanes_of<C>) {
        prefetch_ahead(in + i);  // of the next run: no prefetcher follows across the kernel
        vector_io<C>::store(out + i, vector_io<C>::load(in + i));
      }
  if constexpr (std::is_same_v<C, T>)
    if (stride == 1) {
      if (i < n) vector_io<C>::store(out + i, load_some(in + i, static_cast<int>(n - i)));
      return;
    }
  for (; i < n; ++i) out[i] = load1<C>(in + i * stride);
}

template <class C, class T>
void store_run(T* out, const C* in, int64_t stride, int64_t n) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + lanes_of<C> <= n; i += lanes_of<C>)
      vector_io<C>::store(out + i, vector_io<C>::load(in + i));
  if constexpr (std::is_same_v<C, T>)
    if (stride == 1)
      return store_some(out + i, vector_io<C>::load(in + i), static_cast<int>(n - i));
  for (; i < n; ++i) store1(out + i * stride, in[i]);
}

template <class C, class T>
void gather_run(C* out, const T* in, const int64_t* at, int n) {
  for (int i = 0; i < n; ++i) out[i] = load1<C>(in + at[i]);
}

template <class C, class T>
void scatter_run(T* out, const C* in, const int64_t* at, int n) {
  for (int i = 0; i < n; ++i) store1(out + at[i], in[i]);
}

// Stochastic rounding. `shift` picks the operand's half of the noise.
inline void store_noisy1(bf16* out, float x, uint32_t noise, int shift) {
  out->bits =
      static_cast<uint16_t>(round_bf16_stochastic<uint32_t>(x, (noise >> shift) & 0xffffu) >> 16);
}

inline void store_noisy(bf16* out, const float* in, const uint32_t* noise, int shift,
                        int64_t stride, int64_t n) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + kFloats <= n; i += kFloats) {
      vu32 random;
      std::memcpy(&random, noise + i, sizeof(random));
      store_noisy(out + i, vector_io<float>::load(in + i), (random >> shift) & 0xffffu);
    }
  for (; i < n; ++i) store_noisy1(out + i * stride, in[i], noise[i], shift);
}

// Kahan's: x was read without its companion, `rest`; or x is made what will be kept of it, and
// `rest` what the parameter will not hold of that.
template <class C>
void add_run(C* x, const C* rest, int64_t n) {
  for (int64_t i = 0; i < n; i += lanes_of<C>)
    vector_io<C>::store(x + i, vector_io<C>::load(x + i) + vector_io<C>::load(rest + i));
}

template <class T>
PYSMOOTH_HD vec<float> rounded(vec<float> x) {
  T stored[kFloats];
  vector_io<float>::store(stored, x);
  return vector_io<float>::load(stored);
}

template <class T>
void split_run(float* x, float* rest, int64_t n) {
  using io = vector_io<float>;
  const vec<float> zero{};
  for (int64_t i = 0; i < n; i += kFloats) {
    const vec<float> value = io::load(x + i), q = rounded<T>(value);
    const vec<float> y = q - q == zero ? q + rounded<T>(value - q) : value, p = rounded<T>(y);
    io::store(x + i, y);
    io::store(rest + i, p - p == zero ? y - p : zero);
  }
}

void split_run(float* x, float* rest, DType stored, int64_t n) {
  return stored == DType::bf16 ? split_run<bf16>(x, rest, n) : split_run<f16>(x, rest, n);
}
void split_run(double*, double*, DType, int64_t) {}  // no 16-bit type computes in double

// ---- operands -----------------------------------------------------------------------------------

// Calls body with a pointer of the type that the operand is stored as.
template <class Body>
void with_type(void* base, DType dtype, Body body) {
  if (dtype == DType::f32) return body(static_cast<float*>(base));
  if (dtype == DType::f64) return body(static_cast<double*>(base));
  if (dtype == DType::bf16) return body(static_cast<bf16*>(base));
  return body(static_cast<f16*>(base));
}

// The same for an operand that is written: never wider than C.
template <class C, class Body>
void with_stored_type(void* base, DType dtype, Body body) {
  if constexpr (sizeof(C) == 8) {
    body(static_cast<double*>(base));
  } else {
    if (dtype == DType::f32) return body(static_cast<float*>(base));
    if (dtype == DType::bf16) return body(static_cast<bf16*>(base));
    return body(static_cast<f16*>(base));
  }
}

template <class C>
void Staging<C>::read(unsigned set) {
  if (is_short_tail()) {  // what tiny tensors are made of
    return each_of(set, [&](int k) {
      const C* const p = static_cast<C*>(base_of(args_, k)) + args_.begin + done_;
      vector_io<C>::store(room_[k], load_some(p, static_cast<int>(count)));
    });
  }
  const bool adds = args_.storage == ParamStorage::kahan && has(set, 0);
  if (args_.layout == nullptr) {
    each_of(set, [&](int k) {
      with_type(base_of(args_, k), args_.dtype[k],
                [&](auto* p) { load_run<C>(room_[k], p + args_.begin + done_, 1, count); });
    });
    if (adds) add_run(room_[0], room_[args_.companion], count);
    return;
  }
  const Layout& layout = *args_.layout;
  int64_t filled = 0;
  walk(layout, args_.begin + done_, count, [&](const int64_t* offset, int64_t n) {
    each_of(set, [&](int k) {
      with_type(base_of(args_, k), args_.dtype[k], [&](auto* p) {
        load_run<C>(room_[k] + filled, p + offset[k], layout.stride[k][layout.ndim - 1], n);
      });
    });
    filled += n;
  });
  if (adds) add_run(room_[0], room_[args_.companion], count);
}

// The coefficients of rows, where they differ.
template <class C>
void Staging<C>::scale_rows() {
  const RowCoefs& r = args_.rows;
  C* const x = room_[r.operand];
  const int64_t first = args_.begin + done_;
  int64_t row = row_of(r, first), left = r.run - first % r.run;
  for (int64_t i = 0; i < count; left = r.run) {
    const C coef = static_cast<C>(r.coefs[row]);
    const int64_t end = left < count - i ? i + left : count;
    for (; i < end; ++i) x[i] *= coef;
    row = row + 1 == r.rows ? 0 : row + 1;
  }
}

// Noise depends on where an element is in the order that the tensor is walked in, and not on how
// the walk is cut up.
template <class C>
void Staging<C>::fill_noise(int pair) {
  const NoiseKey key = args_.noise.shifted(pair);
  const auto first = static_cast<uint32_t>(args_.begin + done_);
  vu32 place = noise_places(first);
  for (int64_t i = 0; i < count; i += kFloats, place += kNoiseStride * kFloats) {
    const vu32 x = noise(place, key);
    std::memcpy(noise_ + i, &x, sizeof(x));
  }
}

template <class C>
void Staging<C>::write_back() {
  unsigned set = staged_ & touch_.writes;
  if (is_short_tail()) {
    return each_of(set, [&](int k) {
      C* const p = static_cast<C*>(base_of(args_, k)) + args_.begin + done_;
      store_some(p, vector_io<C>::load(room_[k]), static_cast<int>(count));
    });
  }
  if (args_.storage == ParamStorage::kahan && has(set, 0))
    split_run(room_[0], room_[args_.companion], args_.dtype[0], count);
  if constexpr (sizeof(C) == 4) {
    int pair = -1;
    each_of(set & args_.stochastic, [&](int k) {
      const int turn = turn_of(args_.stochastic, k), shift = noise_shift(turn);
      if (turn / 2 != pair) fill_noise(pair = turn / 2);
      auto* const p = static_cast<bf16*>(base_of(args_, k));
      if (args_.layout == nullptr)
        return store_noisy(p + args_.begin + done_, room_[k], noise_, shift, 1, count);
      const Layout& layout = *args_.layout;
      int64_t filled = 0;
      walk(layout, args_.begin + done_, count, [&](const int64_t* offset, int64_t n) {
        store_noisy(p + offset[k], room_[k] + filled, noise_ + filled, shift,
                    layout.stride[k][layout.ndim - 1], n);
        filled += n;
      });
    });
    set &= ~args_.stochastic;
  }
  if (args_.layout == nullptr) {
    return each_of(set, [&](int k) {
      with_stored_type<C>(base_of(args_, k), args_.dtype[k], [&](auto* p) {
        store_run<C>(p + args_.begin + done_, operand[k], 1, count);
      });
    });
  }
  const Layout& layout = *args_.layout;
  int64_t filled = 0;
  walk(layout, args_.begin + done_, count, [&](const int64_t* offset, int64_t n) {
    each_of(set, [&](int k) {
      with_stored_type<C>(base_of(args_, k), args_.dtype[k], [&](auto* p) {
        store_run<C>(p + offset[k], operand[k] + filled, layout.stride[k][layout.ndim - 1], n);
      });
    });
    filled += n;
  });
}

// ---- single elements ----------------------------------------------------------------------------

template <class C>
Gathering<C>::Gathering(const ApplyArgs& args, Touch touch)
    : args_(args), touch_(with_companion(args, touch)) {
  for (int k = 0; k < kMaxOperands; ++k) operand[k] = room_[k];
  if (args.storage == ParamStorage::master) operand[args.companion] = room_[0];
}

template <class C>
void Gathering<C>::prefetch(const uint32_t* index, int count) const {
  if (args_.layout != nullptr) return;
  for (int i = 0; i < count; ++i) prefetch_at(args_, touch_, args_.begin + index[i]);
}

template <class C>
void Gathering<C>::read(const uint32_t* chosen, int count) {
  const bool linear = args_.layout == nullptr;
  for (int i = 0; i < count; ++i) {
    int64_t index = args_.begin + chosen[i];
    index_[i] = static_cast<uint32_t>(index);
    if (linear) {
      at_[0][i] = index;
      continue;
    }
    const Layout& layout = *args_.layout;
    const int operands = layout.operands;
    for (int k = 0; k < operands; ++k) at_[k][i] = 0;
    for (int d = layout.ndim - 1; d >= 0; --d) {
      const int64_t step = index % layout.size[d];
      index /= layout.size[d];
      for (int k = 0; k < operands; ++k) at_[k][i] += step * layout.stride[k][d];
    }
  }
  for (int k = 0; k < kMaxOperands; ++k) {
    if (!has(touch_.reads, k)) continue;
    with_type(base_of(args_, k), args_.dtype[k],
              [&](auto* p) { gather_run<C>(room_[k], p, at_[linear ? 0 : k], count); });
    for (int i = count; i % lanes_of<C> != 0; ++i) room_[k][i] = C(0);
  }
  if (args_.storage == ParamStorage::kahan && has(touch_.reads, 0))
    add_run(room_[0], room_[args_.companion], count);
  const RowCoefs& r = args_.rows;
  if (r.coefs == nullptr || !has(touch_.reads, r.operand)) return;
  for (int i = 0; i < count; ++i)
    room_[r.operand][i] *= static_cast<C>(r.coefs[row_of(r, args_.begin + chosen[i])]);
}

template <class C>
void Gathering<C>::write_back(int count) {
  const bool linear = args_.layout == nullptr;
  if (args_.storage == ParamStorage::kahan && has(touch_.writes, 0))
    split_run(room_[0], room_[args_.companion], args_.dtype[0], count);
  each_of(touch_.writes, [&](int k) {
    const int64_t* const at = at_[linear ? 0 : k];
    if constexpr (sizeof(C) == 4)
      if (has(args_.stochastic, k)) {
        const int turn = turn_of(args_.stochastic, k);
        const NoiseKey key = args_.noise.shifted(turn / 2);
        auto* const p = static_cast<bf16*>(base_of(args_, k));
        for (int i = 0; i < count; ++i)
          store_noisy1(p + at[i], room_[k][i], noise(index_[i] * kNoiseStride, key),
                       noise_shift(turn));
        return;
      }
    with_stored_type<C>(base_of(args_, k), args_.dtype[k],
                        [&](auto* p) { scatter_run<C>(p, operand[k], at, count); });
  });
}

template class Staging<float>;
template class Staging<double>;
template class Gathering<float>;
template class Gathering<double>;

PYSMOOTH_KERNELS_END

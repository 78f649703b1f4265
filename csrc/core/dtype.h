// Element types: the tags that kernels are instantiated for and their run-time names.
#pragma once

#include <cstdint>

namespace pysmooth {

enum class DType : uint8_t { f32, f64, bf16, f16 };
constexpr int kDTypes = 4;

// Storage of the 16-bit types; arithmetic on them happens in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr int itemsize(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

constexpr const char* dtype_name(DType t) {
  return t == DType::f32    ? "float32"
         : t == DType::f64  ? "float64"
         : t == DType::bf16 ? "bfloat16"
                            : "float16";
}

template <class T>
struct dtype_traits;
template <>
struct dtype_traits<float> {
  static constexpr DType value = DType::f32;
  using compute = float;
};
template <>
struct dtype_traits<double> {
  static constexpr DType value = DType::f64;
  using compute = double;
};
template <>
struct dtype_traits<bf16> {
  static constexpr DType value = DType::bf16;
  using compute = float;
};
template <>
struct dtype_traits<f16> {
  static constexpr DType value = DType::f16;
  using compute = float;
};

// The type a rule computes in, and keeps its states in: float, or double for double.
template <class T>
using compute_t = typename dtype_traits<T>::compute;

}  // namespace pysmooth

// The codec for Python: addresses of contiguous tensors, which the caller has looked at.

#include <vector>

#include "bindings/address.h"
#include "bindings/plan.h"
#include "core/random.h"
#include "cpu/codec.h"

namespace pysmooth {
namespace {

SignMessages messages_of(uintptr_t first, int64_t stride, int ranks, uintptr_t scales,
                         std::vector<const uint8_t*>* bits) {
  for (int r = 0; r < ranks; ++r) bits->push_back(at<const uint8_t>(first) + r * stride);
  return {bits->data(), at<const float>(scales), ranks};
}

}  // namespace

void bind_codec(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "code",
      [](uintptr_t g, uintptr_t e, float a, float b, int64_t n, uintptr_t out, uintptr_t bits,
         int threads) {
        return code({at<const float>(g), at<const float>(e), a, b}, n, at<float>(out),
                    at<uint8_t>(bits), threads);
      },
      release());
  m.def(
      "code_top_k",
      [](uintptr_t g, uintptr_t e, float a, float b, int64_t n, int64_t k, uintptr_t out,
         uintptr_t index, uintptr_t values, int threads) {
        return code_top_k({at<const float>(g), at<const float>(e), a, b}, n, k, at<float>(out),
                          at<int64_t>(index), at<float>(values), threads);
      },
      release());
  m.def(
      "subtract_signs",
      [](uintptr_t x, int64_t n, float scale, int threads) {
        subtract_signs(at<float>(x), n, scale, threads);
      },
      release());
  m.def(
      "sum_signs",
      [](uintptr_t first, int64_t stride, int ranks, uintptr_t scales, int64_t n, float factor,
         uintptr_t out, uintptr_t signs, int threads) {
        std::vector<const uint8_t*> bits;
        sum_signs(messages_of(first, stride, ranks, scales, &bits), n, factor, at<float>(out),
                  at<uint8_t>(signs), threads);
      },
      release());
  m.def(
      "sum_top_k",
      [](uintptr_t first, int64_t stride, int ranks, int64_t n, int64_t k, float factor,
         uintptr_t base, uintptr_t out, int threads) {
        sum_top_k(at<const uint8_t>(first), stride, ranks, n, k, factor, at<const float>(base),
                  at<float>(out), threads);
      },
      release());
  m.def(
      "code_natural",
      [](uintptr_t g, uintptr_t e, float a, float b, int64_t n, uint64_t seed, uint32_t step,
         uint32_t tensor, uintptr_t out, uintptr_t message, int threads) {
        code_natural({at<const float>(g), at<const float>(e), a, b}, n, {seed, step, tensor},
                     at<float>(out), at<uint8_t>(message), threads);
      },
      release());
  m.def(
      "sum_natural",
      [](uintptr_t first, int64_t stride, int ranks, int64_t n, uintptr_t out, int threads) {
        sum_natural(at<const uint8_t>(first), stride, ranks, n, at<float>(out), threads);
      },
      release());
  m.def(
      "code_levels",
      [](uintptr_t g, uintptr_t e, float a, float b, int64_t n, uint64_t seed, uint32_t step,
         uint32_t tensor, int levels, int64_t block, uintptr_t out, uintptr_t message,
         int threads) {
        code_levels({at<const float>(g), at<const float>(e), a, b}, n, {seed, step, tensor}, levels,
                    block, at<float>(out), at<uint8_t>(message), threads);
      },
      release());
  m.def(
      "sum_levels",
      [](uintptr_t first, int64_t stride, int ranks, int64_t n, int levels, int64_t block,
         uintptr_t out, int threads) {
        sum_levels(at<const uint8_t>(first), stride, ranks, n, levels, block, at<float>(out),
                   threads);
      },
      release());
  m.def(
      "permutation",
      [](int64_t k, int64_t size, uint64_t seed, uint32_t step, uint32_t tensor, uintptr_t out) {
        const Permutation places(static_cast<uint64_t>(size), seed, step, tensor);
        for (int64_t i = 0; i < k; ++i)
          at<int64_t>(out)[i] = static_cast<int64_t>(places(static_cast<uint64_t>(i)));
      },
      release());
  m.def(
      "pack_bits",
      [](uintptr_t numbers, int64_t n, int width, uintptr_t out) {
        pack_bits(at<const int64_t>(numbers), n, width, at<uint8_t>(out));
      },
      release());
  m.def(
      "unpack_bits",
      [](uintptr_t packed, int64_t n, int width, uintptr_t numbers) {
        unpack_bits(at<const uint8_t>(packed), n, width, at<int64_t>(numbers));
      },
      release());
}

}  // namespace pysmooth

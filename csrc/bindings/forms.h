// Forms of tensors, each kept once. Thousands of tensors have a handful of dtypes, shapes and
// strides, which stay in cache while a step asks whether all of them are what they were.
#pragma once

#include <deque>
#include <unordered_map>

#include "bindings/tensor_reader.h"

namespace pysmooth {

class Forms {
 public:
  // Stays where it is as long as this object.
  const Form* of(const DLTensor& t) {
    const size_t hash = hash_of(t);
    const auto [begin, end] = by_hash_.equal_range(hash);
    for (auto at = begin; at != end; ++at)
      if (at->second->same_form(t)) return at->second;
    forms_.emplace_back().assign_form(t);
    by_hash_.emplace(hash, &forms_.back());
    return &forms_.back();
  }

 private:
  static size_t hash_of(const DLTensor& t) {
    uint64_t hash = uint64_t{t.dtype.code} << 8 | t.dtype.bits;
    const auto mix = [&hash](int64_t x) {
      hash = (hash ^ static_cast<uint64_t>(x)) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 29;
    };
    for (int d = 0; d < t.ndim; ++d) {
      mix(t.shape[d]);
      mix(t.strides[d]);
    }
    return static_cast<size_t>(hash);
  }
  std::deque<Form> forms_;
  std::unordered_multimap<size_t, const Form*> by_hash_;
};

}  // namespace pysmooth

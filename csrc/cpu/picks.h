// Where a thread keeps the picks of the chunks it did, for the length of a step. Room is taken for
// as many as there may be, and what was not used of it given back: nothing is copied or moved.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "core/chunks.h"
#include "cpu/kernels.h"

namespace pysmooth {

class PickStore {
 public:
  void clear() { slab_ = values_ = index_ = 0; }

  // Room for up to kChunk picks, until the next call.
  Picks open(int64_t most, bool wide) {
    const auto need = static_cast<size_t>(most + kPickSlack);
    if (slab_ < slabs_.size() && (values_ + need > kSlab || index_ + need > kSlab)) {
      ++slab_;
      values_ = index_ = 0;
    }
    if (slab_ == slabs_.size())
      slabs_.push_back({std::unique_ptr<double[]>(new double[kSlab]),
                        std::unique_ptr<uint32_t[]>(new uint32_t[kSlab])});
    const Slab& slab = slabs_[slab_];
    return {slab.values.get() + values_, slab.index.get() + index_, 0, wide};
  }
  // What open() gave stays as it is.
  void keep(const Picks& picks) {
    const auto used = static_cast<size_t>(picks.count + kPickSlack);
    values_ += picks.wide ? used : (used + 1) / 2;
    index_ += used;
  }

 private:
  static constexpr size_t kSlab = size_t{1} << 18;
  static_assert(kSlab >= kChunk + kPickSlack, "a chunk's picks fit");
  struct Slab {
    std::unique_ptr<double[]> values;
    std::unique_ptr<uint32_t[]> index;
  };
  std::vector<Slab> slabs_;
  size_t slab_ = 0, values_ = 0, index_ = 0;  // where the free room starts
};

}  // namespace pysmooth

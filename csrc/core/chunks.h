// The chunk table: all tensors of a list cut into pieces of at most kChunk elements, so that
// threads (or blocks) share the work of all tensors together, never tensor by tensor.
//
// The cut depends on the sizes alone. Partial results are kept per chunk and combined in chunk
// order, which makes every result independent of the number of threads and of who did what.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pysmooth {

constexpr int64_t kChunk = 32768;

struct Chunk {
  int32_t tensor;
  int32_t length;
  int64_t begin;
};

class ChunkTable {
 public:
  void clear() {
    chunks_.clear();
    first_.assign(1, 0);
    total_ = 0;
  }
  void add(int64_t numel) {
    const auto tensor = static_cast<int32_t>(first_.size() - 1);
    for (int64_t begin = 0; begin < numel; begin += kChunk)
      chunks_.push_back(
          {tensor, static_cast<int32_t>(numel - begin < kChunk ? numel - begin : kChunk), begin});
    first_.push_back(static_cast<int64_t>(chunks_.size()));
    total_ += numel;
  }
  int64_t size() const { return static_cast<int64_t>(chunks_.size()); }
  int64_t tensors() const { return static_cast<int64_t>(first_.size()) - 1; }
  int64_t total() const { return total_; }
  const Chunk& operator[](int64_t i) const { return chunks_[static_cast<size_t>(i)]; }
  // Chunks [first(t), first(t + 1)) belong to tensor t.
  int64_t first(int64_t tensor) const { return first_[static_cast<size_t>(tensor)]; }

  // Cuts the table into `parts` runs of about equal element counts; run i is
  // [result[i], result[i + 1]).
  std::vector<int64_t> split(int parts) const {
    std::vector<int64_t> bounds{0};
    int64_t seen = 0;
    for (int64_t i = 0; i < size() && static_cast<int>(bounds.size()) < parts; ++i) {
      seen += (*this)[i].length;
      if (seen * parts >= total_ * static_cast<int64_t>(bounds.size())) bounds.push_back(i + 1);
    }
    bounds.resize(static_cast<size_t>(parts) + 1, size());
    bounds[static_cast<size_t>(parts)] = size();
    return bounds;
  }

 private:
  std::vector<Chunk> chunks_;
  std::vector<int64_t> first_{0};
  int64_t total_ = 0;
};

}  // namespace pysmooth

// Sums over clients' vectors: blocks for threads.

#include <algorithm>
#include <vector>

#include "core/chunks.h"
#include "cpu/aggregate.h"
#include "cpu/run.h"

namespace pysmooth {
namespace {

constexpr int64_t kPiece = 8192;  // elements, as kBlock in cpu/fold.h

// body(block, first element, elements), on some thread.
template <class Body>
void each_block(int64_t n, int threads, Body body) {
  struct Context {
    Body* body;
    int64_t n;
  } context{&body, n};
  const int64_t blocks = (n + kPiece - 1) / kPiece;
  parallel_ranges(
      blocks, 1, threads,
      [](void* p, int64_t first, int64_t last) {
        const auto* const c = static_cast<Context*>(p);
        for (int64_t b = first; b < last; ++b)
          (*c->body)(static_cast<size_t>(b), b* kPiece, std::min(kPiece, c->n - b * kPiece));
      },
      &context);
}

size_t blocks_of(int64_t n) { return static_cast<size_t>((n + kPiece - 1) / kPiece); }

}  // namespace

double sum_clients(const Clients& clients, int64_t n, void* out, int threads) {
  std::vector<double> squares(blocks_of(n));
  const auto sum = kernels().aggregate.sum[clients.wide ? 1 : 0];
  each_block(n, threads, [&](size_t block, int64_t begin, int64_t length) {
    squares[block] = sum(clients, begin, length, out).value;
  });
  // By chunks, as the sums of a reduction are.
  constexpr size_t kOfChunk = kChunk / kPiece;
  double total = 0.0;
  for (size_t i = 0; i < squares.size(); i += kOfChunk) {
    double chunk = 0.0;
    for (size_t j = i; j < std::min(i + kOfChunk, squares.size()); ++j) chunk += squares[j];
    total += chunk;
  }
  return total;
}

void dot_clients(const Clients& clients, int64_t n, const void* other, double* out, int threads) {
  const auto count = static_cast<size_t>(clients.count);
  std::vector<double> parts(blocks_of(n) * count);
  const auto dot = kernels().aggregate.dot[clients.wide ? 1 : 0];
  each_block(n, threads, [&](size_t block, int64_t begin, int64_t length) {
    dot(clients, begin, length, other, &parts[block * count]);
  });
  for (size_t block = 0; block < blocks_of(n); ++block)
    for (size_t c = 0; c < count; ++c) out[c] += parts[block * count + c];
}

}  // namespace pysmooth

#include "bindings/aliasing.h"

#include <algorithm>
#include <numeric>
#include <unordered_set>

namespace pysmooth {
namespace {

// Every byte offset of an element of `r`, relative to `base`, passed to visit until it says stop.
template <class Visit>
bool each_element(const Region& r, uintptr_t base, Visit visit) {
  uintptr_t at = r.begin - base;
  if (r.view == nullptr) {
    for (int64_t i = 0; i < r.numel; ++i, at += static_cast<uintptr_t>(r.itemsize))
      if (visit(at)) return true;
    return false;
  }
  const RealView& v = *r.view;
  const size_t ndim = v.shape.size();
  std::vector<int64_t> index(ndim, 0);
  for (int64_t i = 0; i < v.numel; ++i) {
    if (visit(at)) return true;
    for (size_t d = ndim; d-- > 0;) {
      at += static_cast<uintptr_t>(v.strides[d]) * static_cast<uintptr_t>(r.itemsize);
      if (++index[d] < v.shape[d]) break;
      at -= static_cast<uintptr_t>(v.strides[d] * v.shape[d]) * static_cast<uintptr_t>(r.itemsize);
      index[d] = 0;
    }
  }
  return false;
}

bool dense(const Region& r) {
  return static_cast<int64_t>(r.end - r.begin) == r.numel * r.itemsize;
}

// Two regions whose spans intersect: do they have an element in common?
bool share(const Region& a, const Region& b) {
  if (dense(a) && dense(b)) return true;
  // All elements of both lie on a grid of pitch g. If the bases differ, modulo g, by at least an
  // element, the two never meet.
  int64_t pitch = 0;
  for (const Region* r : {&a, &b}) {
    if (r->view == nullptr) pitch = std::gcd(pitch, int64_t{r->itemsize});
    for (size_t d = 0; r->view != nullptr && d < r->view->shape.size(); ++d)
      if (r->view->shape[d] > 1) pitch = std::gcd(pitch, r->view->strides[d] * r->itemsize);
  }
  if (pitch > 0) {
    const auto shift = static_cast<int64_t>((b.begin - a.begin) % static_cast<uintptr_t>(pitch));
    if (shift >= a.itemsize && pitch - shift >= b.itemsize) return false;
  }
  // Otherwise look at every element, the bytes of the smaller one in a set.
  const Region& small = a.numel <= b.numel ? a : b;
  const Region& large = a.numel <= b.numel ? b : a;
  const uintptr_t base = std::min(a.begin, b.begin);
  std::unordered_set<uintptr_t> bytes;
  each_element(small, base, [&](uintptr_t at) {
    for (int k = 0; k < small.itemsize; ++k) bytes.insert(at + static_cast<uintptr_t>(k));
    return false;
  });
  return each_element(large, base, [&](uintptr_t at) {
    for (int k = 0; k < large.itemsize; ++k)
      if (bytes.count(at + static_cast<uintptr_t>(k)) != 0) return true;
    return false;
  });
}

}  // namespace

Region Region::of(const void* data, const RealView& view, int index) {
  Region r;
  r.begin = r.end = reinterpret_cast<uintptr_t>(data);
  r.itemsize = pysmooth::itemsize(view.dtype);
  r.numel = view.numel;
  r.view = &view;
  r.index = index;
  if (view.numel == 0) return r;
  int64_t span = 1;
  for (size_t d = 0; d < view.shape.size(); ++d) span += (view.shape[d] - 1) * view.strides[d];
  r.end += static_cast<uintptr_t>(span * r.itemsize);
  return r;
}

Region Region::dense(const void* data, int64_t numel, int itemsize, int index) {
  Region r;
  r.begin = reinterpret_cast<uintptr_t>(data);
  r.end = r.begin + static_cast<uintptr_t>(numel * itemsize);
  r.itemsize = itemsize;
  r.numel = numel;
  r.index = index;
  return r;
}

std::pair<int, int> find_alias(std::vector<Region> regions) {
  std::sort(regions.begin(), regions.end(),
            [](const Region& a, const Region& b) { return a.begin < b.begin; });
  // Sweep by start address; `open` holds the regions that reach past the current start.
  std::vector<const Region*> open;
  for (const Region& r : regions) {
    if (r.begin == r.end) continue;
    open.erase(std::remove_if(open.begin(), open.end(),
                              [&](const Region* o) { return o->end <= r.begin; }),
               open.end());
    for (const Region* o : open)
      if (share(*o, r)) return {std::min(o->index, r.index), std::max(o->index, r.index)};
    open.push_back(&r);
  }
  return {-1, -1};
}

}  // namespace pysmooth

#include "bindings/backward_sums.h"

#include <algorithm>
#include <cstring>

namespace pysmooth {
namespace {

constexpr int64_t kLine = 64;
// Chunks that a thread takes at a time: fewer are read sooner than the others wake up.
constexpr int64_t kGrain = 4;

// Everything but the signs of the floating-point numbers in 8 bytes.
uint64_t magnitudes(DType dtype) {
  if (dtype == DType::f64) return 0x7fffffffffffffffu;
  return dtype == DType::f32 ? 0x7fffffff7fffffffu : 0x7fff7fff7fff7fffu;
}

// Of the tensor that a weak reference is to; null where it is gone.
PyObject* referent(const py::object& weak) {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* alive = nullptr;
  if (PyWeakref_GetRef(weak.ptr(), &alive) <= 0) return nullptr;
  Py_DECREF(alive);  // only its identity counts, and the caller holds the one it is compared with
  return alive;
#else
  PyObject* const alive = PyWeakref_GetObject(weak.ptr());
  return alive == Py_None ? nullptr : alive;
#endif
}

}  // namespace

void BackwardSums::take(const py::object& param) {
  valid_ = false;
  const py::object grad = grad_of_(param.ptr());
  if (grad.is_none()) return;  // another hook was there first
  try {
    DLTensor d;
    shared_reader().read(grad.ptr(), &d, [] { return std::string("gradient"); });
    if (!form_.same_form(d)) {
      form_.ndim = -1;
      Signature form;
      form.assign(d);
      const RealView view = RealView::of(form, "gradient");
      Layout layout;
      if (!merge_layout(static_cast<int>(view.shape.size()), view.shape.data(),
                        {view.strides.data()}, &layout) ||
          !layout.linear())
        return;
      dtype_ = view.dtype;
      itemsize_ = itemsize(dtype_);
      chunks_.clear();
      chunks_.add(view.numel);
      partials_.resize(static_cast<size_t>(chunks_.size()));
      marks_.resize(partials_.size());
      form_ = std::move(form);
    }
    form_.data = d.data;
    if ((d.dtype.code == kDLComplex || chunks_.total() == 1) && has_lazy_bits(grad.ptr())) return;
    version_ = py::cast<int64_t>(version_of_(grad.ptr()));
  } catch (const py::error_already_set&) {
    return;
  } catch (const std::exception&) {
    return;
  }
  grad_ = py::reinterpret_steal<py::object>(PyWeakref_NewRef(grad.ptr(), nullptr));
  if (!grad_) throw py::error_already_set();
  if (chunks_.total() < kSerialElements) {
    sum_up(0, chunks_.size());
  } else {
    const py::gil_scoped_release nogil;
    parallel_ranges(
        chunks_.size(), kGrain, default_threads(),
        [](void* self, int64_t from, int64_t to) {
          static_cast<BackwardSums*>(self)->sum_up(from, to);
        },
        this);
  }
  valid_ = true;
}

void BackwardSums::sum_up(int64_t from, int64_t to) {
  for (int64_t i = from; i < to; ++i) {
    partials_[static_cast<size_t>(i)] =
        reduce_chunk(form_.data, dtype_, nullptr, chunks_[i], norm_type_);
    marks_[static_cast<size_t>(i)] = mark_of(chunks_[i]);
  }
}

Kept BackwardSums::find(const py::object& grad, const DLTensor& d, Partial* out) {
  if (!valid_ || referent(grad_) != grad.ptr() || !form_.same(d)) return Kept::none;
  if (py::cast<int64_t>(version_of_(grad.ptr())) != version_) return Kept::none;
  for (int64_t i = 0; i < chunks_.size(); ++i) {
    const Mark& mark = marks_[static_cast<size_t>(i)];
    if (read_line(chunks_[i], mark.line).hash != mark.hash) return Kept::tampered;
  }
  std::copy(partials_.begin(), partials_.end(), out);
  return Kept::valid;
}

BackwardSums::Mark BackwardSums::mark_of(const Chunk& chunk) const {
  const int64_t lines = (chunk.length * itemsize_ + kLine - 1) / kLine;
  int64_t line = 0;
  while (line < lines - 1 && read_line(chunk, line).zeros) ++line;
  return {line, read_line(chunk, line).hash};
}

BackwardSums::Line BackwardSums::read_line(const Chunk& chunk, int64_t line) const {
  const char* const from =
      static_cast<const char*>(form_.data) + chunk.begin * itemsize_ + line * kLine;
  const int64_t left = chunk.length * itemsize_ - line * kLine;
  uint64_t words[kLine / 8] = {};
  std::memcpy(words, from, static_cast<size_t>(std::min(left, kLine)));
  uint64_t hash = 0, any = 0;
  for (const uint64_t word : words) {
    hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
    any |= word;
  }
  return {hash, (any & magnitudes(dtype_)) == 0};
}

void bind_backward_sums(py::module_& m) {
  py::class_<BackwardSums>(m, "BackwardSums")
      .def(py::init<double>(), py::arg("norm_type"))
      .def("__call__", &BackwardSums::take);
}

}  // namespace pysmooth

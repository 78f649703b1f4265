// Reads tensors without libtorch: through the DLPack C exchange API that torch >= 2.10 publishes
// (some 30 ns a tensor), or through Python attributes on older versions.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bindings/dlpack.h"
#include "core/dtype.h"
#include "core/layout.h"

namespace pysmooth {

namespace py = pybind11;

// Raised for tensors that another backend might take: wrong device, dtype or kind of tensor.
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a tensor is, wherever it lies.
struct Form {
  static constexpr int kInline = 4;

  DLDataType dtype = {};
  int32_t ndim = -1;
  int64_t dims[2 * kInline] = {};  // shape, then strides; tensors of more dimensions go to `more`
  std::unique_ptr<int64_t[]> more;

  const int64_t* shape() const { return ndim <= kInline ? dims : more.get(); }
  const int64_t* strides() const { return shape() + ndim; }
  void assign_form(const DLTensor& t);
  bool same_form(const DLTensor& t) const {
    if (t.ndim != ndim || t.dtype.code != dtype.code || t.dtype.bits != dtype.bits) return false;
    const int64_t* const known = shape();
    for (int d = 0; d < ndim; ++d)
      if (t.shape[d] != known[d] || t.strides[d] != known[ndim + d]) return false;
    return true;
  }
};

// What is cached of a tensor, to notice that it moved or changed.
struct Signature : Form {
  void* data = nullptr;

  void assign(const DLTensor& t) {
    data = t.data;
    assign_form(t);
  }
  bool same(const DLTensor& t) const { return t.data == data && same_form(t); }
};

// A tensor as the kernels see it: real, with a complex tensor's parts as a last dimension of 2.
struct RealView {
  DType dtype = DType::f32;
  int64_t numel = 1;
  std::vector<int64_t> shape, strides;

  static RealView of(const Form& s, const std::string& what);
};

class TensorReader {
 public:
  // `use_dlpack` false forces the attribute path.
  explicit TensorReader(bool use_dlpack);

  // Fills `out`; its shape and strides stay valid until the next call. `what` names the tensor in
  // the errors raised for sparse, meta, distributed and other tensors without plain memory.
  template <class What>
  void read(PyObject* tensor, DLTensor* out, const What& what) {
    if (exchange_ == nullptr || exchange_(tensor, out) != 0) read_slow(tensor, out, what());
    out->data = static_cast<char*>(out->data) + out->byte_offset;
    if (out->device.device_type != PYSMOOTH_DEVICE || out->data == nullptr)
      check(tensor, *out, what());
  }

  // Dtype, shape and strides alone: the tensor may be a meta tensor, which has no more.
  template <class What>
  void read_form(PyObject* tensor, DLTensor* out, const What& what) {
    if (!is_meta(tensor)) return read(tensor, out, what);
    *out = DLTensor{};
    fill_form(tensor, out, what());
  }

  // The same of a tensor on any device, without a check; false where it cannot be told so quickly.
  bool peek(PyObject* tensor, DLTensor* out) const {
    if (exchange_ == nullptr) return false;
    if (exchange_(tensor, out) != 0) {
      PyErr_Clear();
      return false;
    }
    out->data = static_cast<char*>(out->data) + out->byte_offset;
    return true;
  }

  bool uses_dlpack() const { return exchange_ != nullptr; }

 private:
  void read_slow(PyObject* tensor, DLTensor* out, const std::string& what);
  static bool is_meta(PyObject* tensor);
  void fill_form(py::handle tensor, DLTensor* out, const std::string& what);
  void check(PyObject* tensor, const DLTensor& t, const std::string& what) const;

  int (*exchange_)(void* tensor, DLTensor* out) = nullptr;
  std::vector<int64_t> scratch_;
};

// The reader every call shares; `dlpack_enabled` is switched off by tests of the attribute path.
TensorReader& shared_reader();
void set_dlpack_enabled(bool enabled);

// True if the tensor's values differ from its memory: torch's lazy conjugation and negation. DLPack
// shows neither.
bool has_lazy_bits(PyObject* tensor);

// Reads an attribute, such as `.grad`, of many tensors of one type: finds the type's getter once,
// and calls it directly.
class AttributeGetter {
 public:
  explicit AttributeGetter(const char* name) : name_(PyUnicode_InternFromString(name)) {}
  py::object operator()(PyObject* tensor) {
    if (Py_TYPE(tensor) != type_) learn(Py_TYPE(tensor));
    PyObject* const value =
        get_ != nullptr ? get_(tensor, closure_) : PyObject_GetAttr(tensor, name_);
    if (value == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
  }

 private:
  void learn(PyTypeObject* type);
  PyTypeObject* type_ = nullptr;
  PyObject* name_;  // interned
  getter get_ = nullptr;
  void* closure_ = nullptr;
};

// Tells autograd that memory was written behind its back.
void increment_version(const py::list& tensors);

}  // namespace pysmooth

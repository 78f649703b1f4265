#include "bindings/tensor_reader.h"

#include <pybind11/gil_safe_call_once.h>

#include <algorithm>
#include <cstdlib>
#include <string>

namespace pysmooth {
namespace {

// The entry point of the exchange API, or null where torch has none that this code understands, or
// where the environment says so.
int (*find_exchange())(void*, DLTensor*) {
  const char* const wanted = std::getenv("PYSMOOTH_DLPACK");
  if (wanted != nullptr && std::string(wanted) == "0") return nullptr;
  const py::object tensor = py::module_::import("torch").attr("Tensor");
  if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) return nullptr;
  const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  const auto* header = static_cast<const DLPackExchangeAPIHeader*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (header == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  while (header != nullptr && header->version.major != DLPACK_MAJOR_VERSION)
    header = header->prev_api;
  if (header == nullptr) return nullptr;
  return reinterpret_cast<const DLPackExchangeAPI*>(header)->dltensor_from_py_object_no_sync;
}

std::string text(py::handle value) { return py::cast<std::string>(py::str(value)); }

DLDataType parse_dtype(const std::string& name, const std::string& what) {
  if (name == "torch.float32") return {kDLFloat, 32, 1};
  if (name == "torch.float64") return {kDLFloat, 64, 1};
  if (name == "torch.float16") return {kDLFloat, 16, 1};
  if (name == "torch.bfloat16") return {kDLBfloat, 16, 1};
  if (name == "torch.complex64") return {kDLComplex, 64, 1};
  if (name == "torch.complex128") return {kDLComplex, 128, 1};
  throw Unsupported(what + " has dtype " + name +
                    ", which the " PYSMOOTH_BACKEND " backend does not take");
}

constexpr const char* kDeviceName = PYSMOOTH_DEVICE == kDLCPU ? "cpu" : "cuda";

[[noreturn]] void refuse_device(const py::object& device, const std::string& what) {
  throw Unsupported(what + " is on device " + text(device) + ", not on a " +
                    (PYSMOOTH_DEVICE == kDLCPU ? "CPU" : "GPU"));
}

bool dlpack_enabled = true;

}  // namespace

void Form::assign_form(const DLTensor& t) {
  dtype = t.dtype;
  ndim = t.ndim;
  if (ndim > kInline) more = std::make_unique<int64_t[]>(2 * static_cast<size_t>(ndim));
  int64_t* const out = ndim <= kInline ? dims : more.get();
  std::copy_n(t.shape, ndim, out);
  std::copy_n(t.strides, ndim, out + ndim);
}

RealView RealView::of(const Form& s, const std::string& what) {
  RealView out;
  const bool is_complex = s.dtype.code == kDLComplex;
  const int bits = is_complex ? s.dtype.bits / 2 : s.dtype.bits;
  if (s.dtype.code == kDLBfloat && bits == 16)
    out.dtype = DType::bf16;
  else if ((s.dtype.code == kDLFloat || is_complex) && bits == 32)
    out.dtype = DType::f32;
  else if ((s.dtype.code == kDLFloat || is_complex) && bits == 64)
    out.dtype = DType::f64;
  else if (s.dtype.code == kDLFloat && bits == 16)
    out.dtype = DType::f16;
  else
    throw Unsupported(what + " has a dtype which the " PYSMOOTH_BACKEND
                             " backend does not take (it takes float32, "
                             "float64, bfloat16, float16, complex64, complex128)");
  out.shape.assign(s.shape(), s.shape() + s.ndim);
  out.strides.assign(s.strides(), s.strides() + s.ndim);
  if (is_complex) {
    for (int64_t& stride : out.strides) stride *= 2;
    out.shape.push_back(2);
    out.strides.push_back(1);
  }
  for (const int64_t size : out.shape) out.numel *= size;
  return out;
}

TensorReader::TensorReader(bool use_dlpack) {
  if (use_dlpack) exchange_ = find_exchange();
}

void TensorReader::read_slow(PyObject* tensor, DLTensor* out, const std::string& what) {
  PyErr_Clear();  // of a failed exchange: the reason is found below, in words
  const py::handle t(tensor);
  static const py::object strided = py::module_::import("torch").attr("strided");
  if (!py::hasattr(t, "data_ptr"))
    throw py::type_error(what + " is not a tensor but " + text(py::type::of(t)));
  if (!py::object(t.attr("layout")).is(strided))
    throw py::value_error(what + " has layout " + text(t.attr("layout")) +
                          "; only dense (torch.strided) tensors are supported");
  const py::object device = t.attr("device");
  if (text(device.attr("type")) != kDeviceName) refuse_device(device, what);
  *out = DLTensor{};
  const py::object index = device.attr("index");
  out->device = {PYSMOOTH_DEVICE, index.is_none() ? 0 : py::cast<int32_t>(index)};
  out->data = reinterpret_cast<void*>(py::cast<uintptr_t>(t.attr("data_ptr")()));
  fill_form(t, out, what);
}

bool TensorReader::is_meta(PyObject* tensor) {
  return py::cast<bool>(py::getattr(tensor, "is_meta", py::bool_(false)));
}

void TensorReader::fill_form(py::handle t, DLTensor* out, const std::string& what) {
  out->dtype = parse_dtype(text(t.attr("dtype")), what);
  const auto shape = py::cast<std::vector<int64_t>>(t.attr("shape"));
  const auto strides = py::cast<std::vector<int64_t>>(t.attr("stride")());
  out->ndim = static_cast<int32_t>(shape.size());
  scratch_ = shape;
  scratch_.insert(scratch_.end(), strides.begin(), strides.end());
  out->shape = scratch_.data();
  out->strides = scratch_.data() + out->ndim;
}

void TensorReader::check(PyObject* tensor, const DLTensor& t, const std::string& what) const {
  if (t.device.device_type != PYSMOOTH_DEVICE)
    refuse_device(py::handle(tensor).attr("device"), what);
  for (int d = 0; d < t.ndim; ++d)
    if (t.shape[d] == 0) return;  // an empty tensor has no memory, and needs none
  throw Unsupported(what + " is a " + text(py::type::of(tensor).attr("__name__")) +
                    " without memory of its own (distributed and fake tensors are not supported)");
}

TensorReader& shared_reader() {
  // Leaked on purpose: the interpreter may be gone before static destructors run.
  static auto* const with_dlpack = new TensorReader(true);
  static auto* const without = new TensorReader(false);
  return dlpack_enabled ? *with_dlpack : *without;
}

void set_dlpack_enabled(bool value) { dlpack_enabled = value; }

bool has_lazy_bits(PyObject* tensor) {
  const py::handle t(tensor);
  return py::cast<bool>(t.attr("is_conj")()) || py::cast<bool>(t.attr("is_neg")());
}

void AttributeGetter::learn(PyTypeObject* type) {
  type_ = type;
  get_ = nullptr;
  if (type->tp_getattro != PyObject_GenericGetAttr) return;  // the type has its own idea
  const auto descriptor =
      py::reinterpret_steal<py::object>(PyObject_GetAttr(reinterpret_cast<PyObject*>(type), name_));
  if (!descriptor) return PyErr_Clear();
  if (Py_TYPE(descriptor.ptr()) != &PyGetSetDescr_Type) return;
  // The descriptor lives as long as the class that defines it, which is torch's own.
  const auto* const found = reinterpret_cast<PyGetSetDescrObject*>(descriptor.ptr());
  get_ = found->d_getset->get;
  closure_ = found->d_getset->closure;
}

namespace {

struct IncrementVersion {
  PyObject* function;
  bool takes_lists;  // from torch 2.6 on; before, one tensor

  IncrementVersion()
      : function(py::object(py::module_::import("torch.autograd.graph").attr("increment_version"))
                     .release()
                     .ptr()) {
    try {
      py::reinterpret_borrow<py::object>(function)(py::list());
      takes_lists = true;
    } catch (const py::error_already_set& error) {
      if (!error.matches(PyExc_RuntimeError) && !error.matches(PyExc_TypeError)) throw;
      takes_lists = false;
    }
  }
};

}  // namespace

void increment_version(const py::list& tensors) {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<IncrementVersion> once;
  const IncrementVersion& increment =
      once.call_once_and_store_result([] { return IncrementVersion(); }).get_stored();
  if (tensors.empty()) return;
  const auto function = py::reinterpret_borrow<py::object>(increment.function);
  if (increment.takes_lists) {
    function(tensors);
  } else {
    for (const py::handle tensor : tensors) function(tensor);
  }
}

}  // namespace pysmooth

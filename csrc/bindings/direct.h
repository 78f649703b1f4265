// torch's tensors, asked without a Python object for each.
//
// A gradient that backward has just made has no Python object; making one costs more than all else
// that a step wants to know of it. So the functions that answer are looked up in the libraries that
// torch has loaded: its stable C interface (aoti_torch_*), which knows a tensor by the address of
// the pointer to its TensorImpl, and two C++ functions, `TensorImpl::grad` and `bump_version`, by
// their linker names. pysmooth is not linked to torch; where something is missing, or does not give
// the answers that Python gives, the way through Python objects and DLPack stays.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstring>
#include <exception>

#include "bindings/dlpack.h"

namespace pysmooth {

// What torch calls a tensor handle: it points to a pointer to the TensorImpl.
using Handle = const void* const*;

class Direct {
 public:
  // Null where there is no such way.
  static const Direct* get();
  // For tests of the other way.
  static void enable(bool enabled);

  // The TensorImpl of a tensor of torch's own types; null for others, which may mean something else
  // by their attributes.
  const void* impl_if_exact(PyObject* tensor) const {
    const bool exact = Py_TYPE(tensor) == tensor_type_ || Py_TYPE(tensor) == parameter_type_;
    return exact ? impl_of(tensor) : nullptr;
  }
  // The same, compared with what Python says.
  const void* impl_of_plain(PyObject* tensor) const;
  // The same of a tensor that was found plain before.
  const void* impl_of(PyObject* plain) const {
    const void* impl;
    std::memcpy(&impl, reinterpret_cast<const char*>(plain) + impl_at_, sizeof impl);
    return impl;
  }

  // Null: there is none.
  Handle grad_of(const void* impl) const {
    const auto grad = static_cast<Handle>(grad_(impl));
    bool defined = false;
    return is_defined_(grad, &defined) == 0 && defined ? grad : nullptr;
  }

  // False for a tensor that is not strided, not on this module's device, or of no dtype known here.
  // Sizes and strides are torch's own.
  bool read(Handle tensor, DLTensor* out) const {
    out->data = data_of(tensor);
    return out->data != nullptr && read_device(tensor, out) && read_form(tensor, out);
  }
  // The same of a tensor on any device, which is not told, and of one without memory.
  bool peek(Handle tensor, DLTensor* out) const {
    return strided(tensor) && read_form(tensor, out) && get_data_(tensor, &out->data) == 0;
  }
  // Null for a tensor that is not strided (which torch would complain about on stderr), or has no
  // memory.
  void* data_of(Handle tensor) const {
    void* out = nullptr;
    return strided(tensor) && get_data_(tensor, &out) == 0 ? out : nullptr;
  }
  // False for a tensor that is not on this module's device.
  bool read_device(Handle tensor, DLTensor* out) const {
    int32_t device = 0;
    if (get_device_(tensor, &device) != 0 || device != device_) return false;
    out->device = {PYSMOOTH_DEVICE, 0};
    return PYSMOOTH_DEVICE == kDLCPU || get_index_(tensor, &out->device.device_id) == 0;
  }
  // Of a strided tensor: all but where it is.
  bool read_form(Handle tensor, DLTensor* out) const {
    int32_t dtype = 0;
    int64_t ndim = 0;
    if (get_dtype_(tensor, &dtype) != 0 || dtype < 0 || dtype >= kDtypes ||
        dtypes_[static_cast<size_t>(dtype)].lanes == 0 || get_dim_(tensor, &ndim) != 0 ||
        get_sizes_(tensor, &out->shape) != 0 || get_strides_(tensor, &out->strides) != 0)
      return false;
    out->ndim = static_cast<int32_t>(ndim);
    out->dtype = dtypes_[static_cast<size_t>(dtype)];
    out->byte_offset = 0;
    return true;
  }

  // Whether torch negates or conjugates what is in memory when it reads it, where tells_lazy().
  bool tells_lazy() const { return is_neg_ != nullptr; }
  bool lazy(Handle tensor) const { return is_neg_(tensor) || is_conj_(tensor); }

  // The same, and the device, in torch's numbers.
  bool peek_placed(Handle tensor, DLTensor* out) const {
    int32_t type = 0;
    if (!peek(tensor, out) || get_device_(tensor, &type) != 0 ||
        get_index_(tensor, &out->device.device_id) != 0)
      return false;
    out->device.device_type = static_cast<DLDeviceType>(type);
    return true;
  }

  // Ask for the cache lines that answers come from, of a TensorImpl or none, and of what it points
  // to. Nothing depends on what is found there.
  static void fetch_impl(const void* impl) {
    if (impl == nullptr) return;
    for (int line = 0; line < 4; ++line)
      __builtin_prefetch(static_cast<const char*>(impl) + 64 * line);
  }
  void fetch_storage(const void* impl) const {
    if (impl == nullptr || storage_at_ == 0) return;
    const void* storage;
    std::memcpy(&storage, static_cast<const char*>(impl) + storage_at_, sizeof storage);
    __builtin_prefetch(storage);
  }

  // Tells autograd of a write.
  void count_write(Handle tensor) const {
    try {
      bump_version_(tensor);
    } catch (const std::exception&) {  // a tensor of inference mode: nobody counts
    }
  }

  // A reference, to be released.
  Handle hold(Handle tensor) const;
  void release(Handle held) const;

 private:
  static constexpr int kDtypes = 64;
  template <class T>
  using Getter = int32_t (*)(Handle tensor, T* out);

  bool strided(Handle tensor) const {
    int32_t layout = 0;
    return get_layout_(tensor, &layout) == 0 && layout == strided_;
  }
  bool find();
  bool agrees() const;
  bool agrees_on_lazy() const;
  bool agrees_on(pybind11::handle tensor, Handle by, DLDataType dtype) const;

  // Where in a tensor's object its TensorImpl is: the first field, perhaps behind a flag. What
  // impl_of() finds there is what Python says when a tensor is first met, or it is not plain.
  size_t impl_at_ = sizeof(PyObject);
  size_t storage_at_ = 0;  // where in a TensorImpl its storage is; 0: not known
  PyTypeObject *tensor_type_ = nullptr, *parameter_type_ = nullptr;
  const void* (*grad_)(const void* impl) = nullptr;
  void (*bump_version_)(Handle tensor) = nullptr;
  bool (*is_neg_)(Handle tensor) = nullptr;  // null: not to be had; then is_conj_ as well
  bool (*is_conj_)(Handle tensor) = nullptr;
  Getter<bool> is_defined_ = nullptr;
  Getter<int32_t> get_layout_ = nullptr, get_device_ = nullptr, get_index_ = nullptr,
                  get_dtype_ = nullptr;
  Getter<int64_t> get_dim_ = nullptr;
  Getter<int64_t*> get_sizes_ = nullptr, get_strides_ = nullptr;
  Getter<void*> get_data_ = nullptr;
  int32_t (*new_handle_)(Handle tensor, Handle* out) = nullptr;
  int32_t (*delete_handle_)(Handle held) = nullptr;
  int32_t strided_ = -1, device_ = -1, other_device_ = -1;
  std::array<DLDataType, kDtypes> dtypes_{};  // by torch's number; no lanes: not taken
};

}  // namespace pysmooth

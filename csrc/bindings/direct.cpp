#include "bindings/direct.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "bindings/tensor_reader.h"

#if __has_include(<dlfcn.h>)
#include <dlfcn.h>
#endif

namespace pysmooth {
namespace {

namespace py = pybind11;

bool direct_enabled = true;

constexpr std::pair<const char*, DLDataType> kKinds[] = {
    {"float32", {kDLFloat, 32, 1}},     {"float64", {kDLFloat, 64, 1}},
    {"float16", {kDLFloat, 16, 1}},     {"bfloat16", {kDLBfloat, 16, 1}},
    {"complex64", {kDLComplex, 64, 1}}, {"complex128", {kDLComplex, 128, 1}}};

// Finds functions in torch's extension module and everything that it is linked to.
class Library {
 public:
#if __has_include(<dlfcn.h>)
  explicit Library(const std::string& path)
      : library_(dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY)) {}
  void* find(const char* name) const {
    return library_ == nullptr ? nullptr : dlsym(library_, name);
  }

 private:
  void* library_;  // stays open: torch is never unloaded
#else
  explicit Library(const std::string&) {}
  void* find(const char*) const { return nullptr; }
#endif
};

template <class Function>
bool find(const Library& library, const char* name, Function* out) {
  void* const found = library.find(name);
  std::memcpy(out, &found, sizeof found);
  return found != nullptr;
}

// The address of the TensorImpl, as Python tells it.
const void* cdata_of(py::handle tensor) {
  return reinterpret_cast<const void*>(py::cast<uintptr_t>(tensor.attr("_cdata")));
}

}  // namespace

bool Direct::find() {
  const py::module_ torch = py::module_::import("torch");
  const Library library(py::cast<std::string>(torch.attr("_C").attr("__file__")));
  const auto get = [&](const char* name, auto* out) { return pysmooth::find(library, name, out); };
  if (!get("_ZNK3c1010TensorImpl4gradEv", &grad_) ||
      !get("_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE", &bump_version_) ||
      !get("aoti_torch_is_defined", &is_defined_) || !get("aoti_torch_get_layout", &get_layout_) ||
      !get("aoti_torch_get_device_type", &get_device_) ||
      !get("aoti_torch_get_device_index", &get_index_) ||
      !get("aoti_torch_get_dtype", &get_dtype_) || !get("aoti_torch_get_dim", &get_dim_) ||
      !get("aoti_torch_get_sizes", &get_sizes_) || !get("aoti_torch_get_strides", &get_strides_) ||
      !get("aoti_torch_get_data_ptr", &get_data_) ||
      !get("aoti_torch_new_tensor_handle", &new_handle_) ||
      !get("aoti_torch_delete_tensor_object", &delete_handle_))
    return false;
  if (!get("_ZN2at6native6is_negERKNS_6TensorE", &is_neg_) ||
      !get("_ZN2at6native7is_conjERKNS_6TensorE", &is_conj_))
    is_neg_ = nullptr;

  const auto number = [&](const std::string& name, int32_t* out) {
    int32_t (*ask)() = nullptr;
    if (!get(("aoti_torch_" + name).c_str(), &ask)) return false;
    *out = ask();
    return true;
  };
  if (!number("layout_strided", &strided_) || !number("device_type_cpu", &device_) ||
      !number("device_type_cuda", &other_device_))
    return false;
  for (const auto& [name, dtype] : kKinds) {
    int32_t at = -1;
    if (!number(std::string("dtype_") + name, &at) || at < 0 || at >= kDtypes) return false;
    dtypes_[static_cast<size_t>(at)] = dtype;
  }

  // Owned by torch's modules, which are never unloaded.
  tensor_type_ = reinterpret_cast<PyTypeObject*>(torch.attr("Tensor").ptr());
  parameter_type_ = reinterpret_cast<PyTypeObject*>(torch.attr("nn").attr("Parameter").ptr());
  const py::object tensor = torch.attr("empty")(1, py::arg("device") = "cpu");
  const void* const impl = cdata_of(tensor);
  if (impl_of(tensor.ptr()) != impl) impl_at_ += sizeof(void*);
  const auto storage = py::cast<uintptr_t>(tensor.attr("untyped_storage")().attr("_cdata"));
  for (size_t at = sizeof(void*); at < 64 && storage_at_ == 0; at += sizeof(void*))
    if (std::memcmp(static_cast<const char*>(impl) + at, &storage, sizeof storage) == 0)
      storage_at_ = at;
  if (tensor_type_->tp_basicsize < static_cast<Py_ssize_t>(impl_at_ + sizeof(void*))) return false;
  return true;
}

// Whether a tensor looks the same as from Python.
bool Direct::agrees_on(py::handle tensor, Handle by, DLDataType dtype) const {
  DLTensor seen{};
  if (by == nullptr || !read(by, &seen)) return false;
  const auto shape = py::cast<std::vector<int64_t>>(tensor.attr("shape"));
  const auto strides = py::cast<std::vector<int64_t>>(tensor.attr("stride")());
  return reinterpret_cast<uintptr_t>(seen.data) == py::cast<uintptr_t>(tensor.attr("data_ptr")()) &&
         std::memcmp(&seen.dtype, &dtype, sizeof dtype) == 0 &&
         std::equal(shape.begin(), shape.end(), seen.shape, seen.shape + seen.ndim) &&
         std::equal(strides.begin(), strides.end(), seen.strides, seen.strides + seen.ndim);
}

// The names found above promise what these functions take, not what they mean in a torch to come.
bool Direct::agrees() const {
  const py::module_ torch = py::module_::import("torch");
  for (const auto& [name, dtype] : kKinds) {
    const py::object kind = torch.attr(name);
    const auto tensor = [&] {  // strides (1, 4), an offset into its memory
      const py::object flat =
          torch.attr("zeros")(14, py::arg("dtype") = kind, py::arg("device") = "cpu");
      return flat.attr("as_strided")(py::make_tuple(3, 4), py::make_tuple(1, 3), 2);
    };
    const py::object param = torch.attr("nn").attr("Parameter")(tensor());
    const void* const impl = impl_of_plain(param.ptr());
    if (impl == nullptr || !agrees_on(param, &impl, dtype) || grad_of(impl) != nullptr)
      return false;
    const py::object grad = tensor();
    param.attr("grad") = grad;
    if (!agrees_on(grad, grad_of(impl), dtype)) return false;
    const auto version = [&] { return py::cast<int64_t>(param.attr("_version")); };
    const int64_t before = version();
    count_write(&impl);
    if (version() != before + 1) return false;
    const Handle held = hold(grad_of(impl));
    const bool same = agrees_on(grad, held, dtype);
    release(held);
    param.attr("grad") = py::none();
    if (!same || grad_of(impl) != nullptr) return false;
  }
  return true;
}

bool Direct::agrees_on_lazy() const {
  const py::object plain = py::module_::import("torch").attr("zeros")(
      1, py::arg("dtype") = py::module_::import("torch").attr("complex64"));
  const py::object conj = plain.attr("conj")(), neg = conj.attr("imag");
  const void* const impls[] = {cdata_of(plain), cdata_of(conj), cdata_of(neg)};
  return !is_neg_(&impls[0]) && !is_conj_(&impls[0]) && !is_neg_(&impls[1]) &&
         is_conj_(&impls[1]) && is_neg_(&impls[2]) && !is_conj_(&impls[2]);
}

const Direct* Direct::get() {
  // Leaked on purpose: the interpreter may be gone before static destructors run.
  static const Direct* const found = []() -> const Direct* {
    const char* const wanted = std::getenv("PYSMOOTH_DIRECT");
    if (wanted != nullptr && std::string(wanted) == "0") return nullptr;
    auto direct = std::make_unique<Direct>();
    try {
      if (!direct->find() || !direct->agrees()) return nullptr;
      if (direct->is_neg_ != nullptr && !direct->agrees_on_lazy()) direct->is_neg_ = nullptr;
      if (PYSMOOTH_DEVICE != kDLCPU) direct->device_ = direct->other_device_;
      return direct.release();
    } catch (const std::exception&) {  // a torch that has other names for things
      return nullptr;
    }
  }();
  return direct_enabled ? found : nullptr;
}

void Direct::enable(bool value) { direct_enabled = value; }

const void* Direct::impl_of_plain(PyObject* tensor) const {
  const void* const impl = impl_if_exact(tensor);
  return impl == cdata_of(tensor) ? impl : nullptr;
}

Handle Direct::hold(Handle tensor) const {
  Handle out = nullptr;
  if (new_handle_(tensor, &out) != 0) throw std::bad_alloc();
  return out;
}

void Direct::release(Handle held) const { delete_handle_(held); }

}  // namespace pysmooth

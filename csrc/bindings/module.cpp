// The extension module pysmooth._cpu.

#include "bindings/clients.h"
#include "bindings/plan.h"
#include "bindings/state_snapshot.h"
#include "bindings/watch.h"

namespace pysmooth {
namespace {

// What this backend implements: Python asks, nobody keeps a list by hand.
py::list rules() {
  py::list out;
  for (int i = 0; i < kernels().rule_count; ++i) {
    const RuleInfo& info = kernels().rules[i];
    py::list hypers, pairs;
    for (int k = 0; k < info.hypers; ++k) hypers.append(info.hyper[k]);
    for (int p = 0; p < kDTypes; ++p)
      for (int g = 0; g < kDTypes; ++g)
        if (info.takes(static_cast<DType>(p), static_cast<DType>(g)))
          pairs.append(
              py::make_tuple(dtype_name(static_cast<DType>(p)), dtype_name(static_cast<DType>(g))));
    py::dict rule;
    rule["name"] = info.name;
    rule["hyper"] = py::tuple(hypers);
    rule["states"] = info.states;
    rule["counts_steps"] = info.counts_steps;
    rule["accumulates"] = info.accumulates;
    rule["dtypes"] = py::tuple(pairs);
    out.append(rule);
  }
  return out;
}

// For engines that are written in Python.
void bind_watch(py::module_& m) {
  py::class_<Watch>(m, "Watch")
      .def(py::init<const py::list&, const py::list&, const py::list&, const py::list&,
                    const py::dict&, const py::list&, bool>(),
           py::kw_only(), py::arg("params"), py::arg("grads"), py::arg("state_dicts"),
           py::arg("state_keys"), py::arg("state"), py::arg("roots"), py::arg("aligns"))
      // 64 bits each; None where anything is not as it was.
      .def("look",
           [](Watch& watch, const py::list& groups, const py::dict& state) -> py::object {
             const void* const* const found = watch.look(groups, state);
             if (found == nullptr) return py::none();
             const size_t bytes = watch.size() * sizeof(void*);
             return py::bytes(reinterpret_cast<const char*>(found), bytes);
           })
      .def("count_written", &Watch::count_written);
}

}  // namespace
}  // namespace pysmooth

PYBIND11_MODULE(_cpu, m) {
  using namespace pysmooth;
  m.doc() = "pysmooth's CPU kernels: reduce and apply over lists of tensors.";
  py::register_exception<Unsupported>(m, "UnsupportedError", PyExc_TypeError);
  in_forked_child();  // registers the fork handler
  bind_backward_sums(m);
  bind_plan(m);
  bind_functional(m);
  bind_watch(m);
  bind_codec(m);
  bind_clients(m);
  py::class_<StateSnapshot>(m, "StateSnapshot")
      .def(py::init<const py::dict&>(), py::arg("state"))
      .def("same", &StateSnapshot::same, py::arg("state"));
  m.def("rules", &rules);
  m.def("isa", [] { return std::string(kernels().isa); });
  m.def("isa_levels", &isa_levels);
  m.def("set_isa", &set_isa, py::arg("isa"));
  m.def("set_dlpack_enabled", &set_dlpack_enabled, py::arg("enabled"));
  Direct::get();  // while no mode of torch is on
  m.def("set_direct_enabled", &Direct::enable, py::arg("enabled"));
  m.def("uses_direct", [] { return Direct::get() != nullptr; });
  m.def("uses_dlpack", [] { return shared_reader().uses_dlpack(); });
}

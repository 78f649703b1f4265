// The extension module pysmooth._cuda. It loads where there is no driver and no GPU.

#include <optional>

#include "bindings/cuda/clip.h"
#include "bindings/cuda/codec.h"
#include "bindings/cuda/plan.h"
#include "cuda/facts.h"
#include "cuda/kernels.h"

namespace pysmooth::cuda {
namespace {

py::list rules() {
  py::list out;
  for (int i = 0; i < kRules; ++i) {
    const RuleFacts& rule = facts(i);
    py::list hypers;
    for (int k = 0; k < rule.hypers; ++k) hypers.append(rule.hyper[k]);
    py::dict facts_of_rule;
    facts_of_rule["name"] = rule.name;
    facts_of_rule["hyper"] = py::tuple(hypers);
    facts_of_rule["states"] = rule.states;
    facts_of_rule["low_states"] = rule.low_states;
    facts_of_rule["reads_grad"] = rule.reads_grad;
    facts_of_rule["counts_steps"] = rule.counts_steps;
    facts_of_rule["accumulates"] = rule.accumulates;
    out.append(facts_of_rule);
  }
  return out;
}

// Why there is no device to run on; None if there is one.
py::object missing() {
  int count = 0;
  const int error = device_count(&count);
  if (error != 0) return py::str(error_text(error));
  if (count == 0) return py::str("there is no CUDA device");
  return py::none();
}

// The sites of a plan, which lives as long as one of them does.
template <class P>
py::list sites_of(const py::object& plan) {
  py::list out;
  for (Site& site : py::cast<P&>(plan).sites())
    out.append(py::cast(&site, py::return_value_policy::reference_internal, plan));
  return out;
}

}  // namespace
}  // namespace pysmooth::cuda

PYBIND11_MODULE(_cuda, m) {
  using namespace pysmooth;
  using namespace pysmooth::cuda;
  m.doc() = "pysmooth's CUDA kernels, as multi-tensor launches over lists of tensors.";
  // Local: the CPU module throws a type of that name too.
  py::register_local_exception<Unsupported>(m, "UnsupportedError", PyExc_TypeError);
  m.attr("device_type") = PYSMOOTH_DEVICE == kDLCPU ? "cpu" : "cuda";
  Direct::get();  // while no mode of torch is on
  m.def("set_direct_enabled", &Direct::enable, py::arg("enabled"));
  m.def("uses_direct", [] { return Direct::get() != nullptr; });
  // Plans that are made from now on: None asks how large they are.
  m.def(
      "set_single_launch",
      [](std::optional<bool> single) {
        single_launch() = !single.has_value() ? SingleLaunch::in_cache
                          : *single           ? SingleLaunch::always
                                              : SingleLaunch::never;
      },
      py::arg("single"));
  m.def("rules", &rules);
  m.def("missing", &missing);
  py::class_<Site>(m, "Site")
      .def("upload", &Site::upload)
      .def_property_readonly("bytes", [](const Site& s) { return s.plan().bytes(); })
      .def_property_readonly("input_bytes", [](const Site& s) { return s.plan().input_bytes(); })
      .def_property_readonly("norm_at", [](const Site& s) { return s.plan().norms_at(); })
      // First byte of the board, and bytes of a site's row.
      .def_property_readonly("board",
                             [](const Site& s) {
                               const DevicePlan& plan = s.plan();
                               return py::make_tuple(plan.board_at(), plan.board_row_bytes());
                             })
      .def_property_readonly("count", [](const Site& s) { return s.plan().sites(); })
      .def_property_readonly("joined", [](const Site& s) { return s.plan().joined_count(); })
      // What processes add up, where they hold parts of tensors, and whose the histograms are.
      .def_property_readonly("exchanged",
                             [](const Site& s) {
                               const DevicePlan& plan = s.plan();
                               py::dict out;
                               out["parts"] = plan.parts_at();
                               out["joined"] = plan.joined_at();
                               out["histograms"] = plan.histograms_at();
                               return py::make_tuple(out, plan.selecting_tensors());
                             })
      // Where results lie in the plan's memory: (first byte, how many numbers).
      .def_property_readonly("places", [](const Site& s) {
        const DevicePlan& plan = s.plan();
        const size_t n = plan.tensors();
        py::dict out;
        out["norms"] = py::make_tuple(plan.norms_at(), plan.units());
        out["coefs"] = py::make_tuple(plan.coefs_at(), n);
        out["skipped"] = py::make_tuple(plan.status_at() + offsetof(Status, skipped), 1);
        out["started"] = py::make_tuple(plan.started_at(), n);
        out["spoiled"] = py::make_tuple(plan.spoiled_at(), n);
        if (plan.is_spread()) out["torn"] = py::make_tuple(plan.torn_at(), 1);
        if (plan.absorbs()) out["taken"] = py::make_tuple(plan.taken_at(), n);
        return out;
      });
  py::class_<StepPlan>(m, "Plan")
      .def(py::init<const py::list&, const py::list&, const py::dict&, const py::list&,
                    const py::list&, const std::vector<std::string>&, const std::vector<int>&,
                    std::vector<std::string>, const std::vector<bool>&, const std::vector<int>&,
                    const std::vector<bool>&, const py::list&, int, int, double,
                    const std::vector<int>&, const py::object&, const std::vector<int64_t>&,
                    const std::vector<int>&, const std::vector<PartOf>&, bool>(),
           py::kw_only(), py::arg("params"), py::arg("grads"), py::arg("state"),
           py::arg("state_dicts"), py::arg("state_keys"), py::arg("rules"), py::arg("groups"),
           py::arg("names"), py::arg("first"), py::arg("param_storage"), py::arg("by_rows"),
           py::arg("state_roots"), py::arg("scope"), py::arg("policy"), py::arg("norm_type"),
           py::arg("stage_scopes"), py::arg("select"), py::arg("absorbed"), py::arg("sites"),
           py::arg("parts"), py::arg("joins"))
      .def_property_readonly("sites", &sites_of<StepPlan>)
      .def("step", &StepPlan::step)
      .def("begin", &StepPlan::begin)
      .def("enqueue", &StepPlan::enqueue)
      .def("meeting", &StepPlan::meeting)
      .def("end", &StepPlan::end)
      .def("holds", &StepPlan::holds)
      .def("absorb", &StepPlan::absorb);
  py::enum_<Meeting>(m, "Meeting")
      .value("DEVICES", Meeting::devices)
      .value("PARTS", Meeting::parts)
      .value("UNITS", Meeting::units)
      .value("HISTOGRAMS", Meeting::histograms);
  py::enum_<Part>(m, "Part")
      .value("WHOLE", Part::whole)
      .value("NORMS", Part::norms)
      .value("REST", Part::rest);
  py::class_<ClipPlan>(m, "ClipPlan")
      .def(py::init<const py::list&, double, const std::vector<int>&>())
      .def_property_readonly("sites", &sites_of<ClipPlan>)
      .def("begin", &ClipPlan::begin)
      .def("run", &ClipPlan::run)
      .def("written", [](const ClipPlan&, const py::list& grads) { increment_version(grads); })
      .def_property_readonly("is_wide", &ClipPlan::is_wide);
  bind_codec(m);
}

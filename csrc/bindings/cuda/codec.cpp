// The codec for Python: launches by name, of numbers and addresses by name. Tensors are contiguous;
// the caller has looked at them.

#include "bindings/cuda/codec.h"

#include <string>
#include <type_traits>

#include "bindings/cuda/plan.h"
#include "cuda/codec.h"

namespace pysmooth::cuda {
namespace {

template <class T>
void assign(T* to, const py::handle& from) {
  if constexpr (std::is_pointer_v<T>)
    *to = reinterpret_cast<T>(from.cast<uintptr_t>());
  else
    *to = from.cast<T>();
}

template <auto kMember>
void set(Coding* c, const py::handle& value) {
  assign(&(c->*kMember), value);
}
template <auto kMember>
void set_source(Coding* c, const py::handle& value) {
  assign(&(c->source.*kMember), value);
}

struct Field {
  const char* name;
  void (*set)(Coding*, const py::handle&);
};
constexpr Field kFields[] = {
    {"g", set_source<&CodedSource::g>},
    {"e", set_source<&CodedSource::e>},
    {"a", set_source<&CodedSource::a>},
    {"b", set_source<&CodedSource::b>},
    {"n", set<&Coding::n>},
    {"out", set<&Coding::out>},
    {"message", set<&Coding::message>},
    {"messages", set<&Coding::messages>},
    {"stride", set<&Coding::stride>},
    {"ranks", set<&Coding::ranks>},
    {"scales", set<&Coding::scales>},
    {"factor", set<&Coding::factor>},
    {"base", set<&Coding::base>},
    {"sums", set<&Coding::sums>},
    {"seed", set<&Coding::seed>},
    {"step", set<&Coding::step>},
    {"tensor", set<&Coding::tensor>},
    {"levels", set<&Coding::levels>},
    {"block", set<&Coding::block>},
    {"units", set<&Coding::units>},
    {"k", set<&Coding::k>},
    {"room", set<&Coding::room>},
    {"width", set<&Coding::width>},
    {"index", set<&Coding::index>},
    {"counts", set<&Coding::counts>},
    {"state", set<&Coding::state>},
};

Coding coding_of(const py::kwargs& given) {
  Coding c{};
  c.source.b = c.factor = 1.0F;
  for (const auto& [key, value] : given) {
    const auto name = key.cast<std::string>();
    const Field* found = nullptr;
    for (const Field& field : kFields)
      if (name == field.name) found = &field;
    if (found == nullptr) throw py::type_error("a launch of the codec has no argument " + name);
    found->set(&c, value);
  }
  return c;
}

}  // namespace

void bind_codec(py::module_& m) {
  using Launch = int (*)(const Coding&, void*);
  const std::pair<const char*, Launch> launches[] = {
      {"code_signs", code_signs},
      {"subtract_signs", subtract_signs},
      {"sum_signs", sum_signs},
      {"vote", vote},
      {"code_natural", code_natural},
      {"sum_natural", sum_natural},
      {"code_levels", code_levels},
      {"sum_levels", sum_levels},
      {"weigh", weigh},
      {"emit", emit},
      {"pack", pack},
      {"scatter", scatter},
      {"count_marks", count_marks},
      {"spread", spread},
      {"code_drawn", code_drawn},
      {"add_drawn", add_drawn},
  };
  for (const auto& [name, launch] : launches)
    m.def(name, [name = name, launch = launch](uintptr_t stream, const py::kwargs& given) {
      check(launch(coding_of(given), reinterpret_cast<void*>(stream)), name);
    });
  m.def("sums_of", &sums_of);
  m.def("squares_of", &squares_of);
  m.def("tiles_of", &tiles_of);
  // Of what weigh() keeps, and where in it the count of what is not finite is.
  m.attr("search_bytes") = sizeof(SearchState);
  m.attr("spoiled_at") = offsetof(SearchState, spoiled);
}

}  // namespace pysmooth::cuda

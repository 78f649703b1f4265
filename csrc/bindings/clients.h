// Sums over clients' vectors, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace pysmooth {

void bind_clients(pybind11::module_& m);

}  // namespace pysmooth

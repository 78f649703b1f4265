#pragma once

#include <pybind11/pybind11.h>

namespace pysmooth::cuda {

void bind_codec(pybind11::module_& m);

}  // namespace pysmooth::cuda

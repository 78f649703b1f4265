// How coordinates are selected, from the tuple that Python hands over.
#pragma once

#include "bindings/tensor_reader.h"
#include "core/chunks.h"
#include "core/step.h"

namespace pysmooth {

inline SelectSpec read_select(const py::handle& given) {
  const auto items = py::reinterpret_borrow<py::tuple>(given);
  SelectSpec out;
  out.kind = static_cast<Selector>(py::cast<int>(items[0]));
  out.scope = static_cast<SelectScope>(py::cast<int>(items[1]));
  out.ratio = py::cast<double>(items[2]);
  out.k = py::cast<int64_t>(items[3]);
  out.block = py::cast<int64_t>(items[4]);
  out.scaled = py::cast<bool>(items[5]);
  out.seed = py::cast<uint64_t>(items[6]);
  if (out.block < 1 || kChunk % out.block != 0)
    throw Unsupported("block_size " + std::to_string(out.block) + " does not divide " +
                      std::to_string(kChunk) +
                      ": the " PYSMOOTH_BACKEND " backend does not take it");
  return out;
}

}  // namespace pysmooth

// run_step for callers that hold the GIL: gathers with it, runs the kernels without it.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <optional>

#include "cpu/run.h"

namespace pysmooth {

// `gather` may throw; what it throws comes out here, once all threads are done.
template <class Collect>
Outcome run_released(Pipeline* pipeline, int threads, Collect gather) {
  std::optional<pybind11::gil_scoped_release> released;
  std::exception_ptr thrown;
  const auto careful = [&] {
    try {
      if (!gather()) return false;
      released.emplace();
      return true;
    } catch (...) {
      thrown = std::current_exception();
      return false;
    }
  };
  Outcome outcome;
  if (pipeline->chunks.total() < kSerialElements)
    outcome = careful() ? run_step(pipeline, threads) : Outcome::stale;
  else
    outcome = run_step(pipeline, threads, careful);
  released.reset();
  if (thrown) std::rethrow_exception(thrown);
  return outcome;
}

}  // namespace pysmooth

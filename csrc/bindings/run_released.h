// run_step for callers that hold the GIL: gathers with it, runs longer kernels without it.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <optional>

#include "cpu/run.h"

namespace pysmooth {

// Whether a step is so short that other Python threads may as well wait for it: a fraction of a
// millisecond. Then nobody can replace a gradient meanwhile, and none has to be held.
inline bool keeps_gil(const Pipeline& pipeline) {
  return pipeline.chunks.total() < int64_t{1} << 20;
}

// `gather` may throw; what it throws comes out here, once all threads are done.
template <class Collect>
Outcome run_released(Pipeline* pipeline, int threads, Collect gather) {
  std::optional<pybind11::gil_scoped_release> released;
  std::exception_ptr thrown;
  const auto careful = [&] {
    try {
      if (!gather()) return false;
      if (!keeps_gil(*pipeline)) released.emplace();
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

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

// A gather whose begin() and finish() may throw: keeps what they throw, and lets go of the GIL
// after them. What others look at meanwhile is safe: the thread that holds the GIL waits for them.
class Released final : public Gather {
 public:
  Released(const Pipeline& pipeline, Gather* gather) : pipeline_(pipeline), gather_(gather) {}

  bool begin() override {
    return careful([this] { return gather_->begin(); });
  }
  size_t tensors() const override { return gather_->tensors(); }
  void look(size_t begin, size_t end) override { gather_->look(begin, end); }
  void check(size_t begin, size_t end) override { gather_->check(begin, end); }
  bool finish() override {
    return careful([this] {
      if (!gather_->finish()) return false;
      if (!keeps_gil(pipeline_)) released_.emplace();
      return true;
    });
  }
  void wrote(size_t begin, size_t end) override { gather_->wrote(begin, end); }

  void rethrow() {
    released_.reset();
    if (thrown_) std::rethrow_exception(thrown_);
  }

 private:
  template <class Body>
  bool careful(Body body) {
    if (thrown_) return false;
    try {
      return body();
    } catch (...) {
      thrown_ = std::current_exception();
      return false;
    }
  }
  const Pipeline& pipeline_;
  Gather* const gather_;
  std::optional<pybind11::gil_scoped_release> released_;
  std::exception_ptr thrown_;
};

// What `gather` throws comes out here, once all threads are done.
inline Outcome run_released(Pipeline* pipeline, int threads, Gather* gather) {
  Released careful(*pipeline, gather);
  const Outcome outcome = run_step(pipeline, threads, &careful);
  careful.rethrow();
  return outcome;
}

}  // namespace pysmooth

// Exchange by a Python object: it asks torch.distributed.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <tuple>
#include <vector>

#include "cpu/run.h"

namespace pysmooth {

class PyExchange : public Exchange {
 public:
  PyExchange(pybind11::object object, bool* failed) : object_(std::move(object)), failed_(failed) {}

  void tensors(Reduction kind, std::vector<double>* sums, std::vector<double>* flags) override {
    guarded([&] {
      std::tie(*sums, *flags) = call<std::tuple<std::vector<double>, std::vector<double>>>(
          "tensors", static_cast<int>(kind), *sums, *flags);
    });
  }
  void units(Reduction kind, Scope scope, std::vector<double>* sums, double* flag) override {
    guarded([&] {
      std::tie(*sums, *flag) = call<std::tuple<std::vector<double>, double>>(
          "units", static_cast<int>(kind), static_cast<int>(scope), *sums, *flag);
    });
  }
  void digits(const std::vector<size_t>& slots, std::vector<int64_t>* histograms) override {
    guarded([&] {  // in place: a list of so many numbers would take longer than the sum
      const auto bytes = static_cast<ssize_t>(histograms->size() * sizeof(int64_t));
      object_.attr("digits")(slots, pybind11::memoryview::from_memory(histograms->data(), bytes));
    });
  }
  void before(const std::vector<size_t>& slots, std::vector<int64_t>* counts) override {
    guarded([&] { *counts = call<std::vector<int64_t>>("before", slots, *counts); });
  }

  // What went wrong in the step that has just ended, if anything did.
  void rethrow() {
    if (!thrown_) return;
    std::exception_ptr thrown;
    std::swap(thrown, thrown_);
    std::rethrow_exception(thrown);
  }

 private:
  template <class T, class... Args>
  T call(const char* method, const Args&... args) {
    return pybind11::cast<T>(object_.attr(method)(args...));
  }
  template <class Body>
  void guarded(Body body) {
    if (*failed_) return;  // the others have stopped as well
    const pybind11::gil_scoped_acquire acquired;
    try {
      body();
    } catch (...) {
      thrown_ = std::current_exception();
      *failed_ = true;
    }
  }

  pybind11::object object_;
  bool* failed_;
  std::exception_ptr thrown_;
};

}  // namespace pysmooth

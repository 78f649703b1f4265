// Sums over clients' vectors for Python: addresses of contiguous tensors, which the caller has
// looked at.

#include "bindings/clients.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/address.h"
#include "cpu/aggregate.h"

namespace pysmooth {

namespace py = pybind11;

namespace {

using Addresses = std::vector<uintptr_t>;

Clients clients_of(const Addresses& addresses, bool wide, const double* weights,
                   std::vector<const void*>* data) {
  const auto count = static_cast<int64_t>(addresses.size());
  if (count < 1 || count > kMostClients)
    throw py::value_error("the number of clients must be from 1 to " +
                          std::to_string(kMostClients));
  for (const uintptr_t address : addresses) data->push_back(at<const void>(address));
  return {data->data(), weights, count, wide};
}

}  // namespace

void bind_clients(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "sum_clients",
      [](const Addresses& addresses, const std::vector<double>& weights, bool wide, int64_t n,
         uintptr_t out, int threads) {
        if (addresses.size() != weights.size())
          throw py::value_error("weights must be as many as clients");
        std::vector<const void*> data;
        return sum_clients(clients_of(addresses, wide, weights.data(), &data), n, at<void>(out),
                           threads);
      },
      release());
  m.def(
      "dot_clients",
      [](const Addresses& addresses, bool wide, int64_t n, uintptr_t other, uintptr_t out,
         int threads) {
        std::vector<const void*> data;
        dot_clients(clients_of(addresses, wide, nullptr, &data), n, at<const void>(other),
                    at<double>(out), threads);
      },
      release());
}

}  // namespace pysmooth

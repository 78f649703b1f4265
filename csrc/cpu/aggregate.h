// aggregate: sums over the vectors of many clients, as a federated server takes them.
//
// Terms are doubles, and are added up in pairs, and pairs of pairs, in the order of the clients:
// the bits are the same for any vector width and any number of threads.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace pysmooth {

constexpr int64_t kMostClients = int64_t{1} << 22;

// out = the sum of weights[c] * data[c]. Returns the sum of squares of out, as stored, summed up as
// reduce does it.
double sum_clients(const Clients& clients, int64_t n, void* out, int threads);

// Adds the sum of data[c] * other, over elements, to out[c].
void dot_clients(const Clients& clients, int64_t n, const void* other, double* out, int threads);

}  // namespace pysmooth

// The units of a selection, a block each: how many are wanted in this step, and which filter a
// sample suggests. Kernels that know no rule.
#pragma once

#include "cuda/select.cuh"

PYSMOOTH_KERNELS_BEGIN

PYSMOOTH_KERNEL begin_select(View plan, Work) {
  if (plan.status->skip != 0) return;
  PYSMOOTH_SHARED(unsigned long long, elements);
  Unit& u = plan.units[blockIdx.x];
  if (threadIdx.x == 0) elements = 0;
  __syncthreads();
  for (int t = u.first_tensor + static_cast<int>(threadIdx.x); t < u.last_tensor; t += kThreads)
    if (is_selecting(plan, t))
      atomicAdd(&elements, static_cast<unsigned long long>(u.jointly != 0 ? plan.entries[t].elements
                                                                          : plan.entries[t].numel));
  uint64_t* const histogram = plan.histogram + int64_t{blockIdx.x} * kDigits;
  for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kThreads) histogram[i] = 0;
  __syncthreads();
  if (threadIdx.x != 0) return;
  u.elements = static_cast<int64_t>(elements);
  u.k = plan.select.chosen_of(u.elements);
  // What reaches the filter is listed; jointly nothing is.
  u.filter = u.jointly != 0 ? ~uint64_t{0} : 1;
  u.complete = u.jointly != 0 ? 0 : 1;
  u.candidates = 0;
  u.threshold = {0, 0, u.k, 0};
}

// The filter that the sample suggests. One block each.
PYSMOOTH_KERNEL set_filter(View plan, Work) {
  if (plan.status->skip != 0) return;
  PYSMOOTH_SHARED(Threshold, threshold);
  PYSMOOTH_SHARED(Histogram, histogram);
  Unit& u = plan.units[blockIdx.x];
  const int64_t size = int64_t{u.sample_lines} * kSampleLine;
  if (size == 0 || u.k == 0) return;
  const double expected =
      static_cast<double>(u.k) / static_cast<double>(u.elements) * static_cast<double>(size);
  const auto rank = static_cast<int64_t>(expected + 5.0 * std::sqrt(expected) + 8.0);
  if (rank >= size) return;
  const uint64_t* const keys = plan.samples + int64_t{u.first_sample} * kSampleLine;
  find_threshold(&threshold, size, rank + 1, u.wide != 0, 0, histogram,
                 [&](int64_t i, auto see) { see(keys[i], 0); });
  if (threadIdx.x != 0 || threshold.key == 0) return;
  u.filter = threshold.key;
  u.complete = 0;
}

PYSMOOTH_KERNELS_END

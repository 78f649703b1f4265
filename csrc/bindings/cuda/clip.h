// clip_grad_norm_ and get_total_norm for gradients on GPUs: the pipeline with the rule "scale",
// over gradients alone. What does not change from call to call is kept, as in StepPlan.
#pragma once

#include <deque>

#include "bindings/cuda/site.h"
#include "bindings/tensor_reader.h"

namespace pysmooth::cuda {

class ClipPlan {
 public:
  // `sites`: at which device each gradient is. Raises Unsupported for gradients that these kernels
  // do not take.
  ClipPlan(const py::list& grads, double norm_type, const std::vector<int>& sites);

  std::vector<Site>& sites() { return sites_; }
  bool is_wide() const { return wide_; }  // a gradient is float64

  // Takes the gradients of a call; false: they have other forms than the plan's. `writes` says
  // whether they are to be scaled in the end: if so they are looked at for elements that would be
  // scaled twice.
  bool begin(const py::list& grads, bool writes);
  // Enqueues a phase of `part` of the call at a site, and says how many phases there are.
  // `inputs`: input_bytes() of memory there.
  int run(size_t site, int phase, double max_norm, Part part, uintptr_t inputs, uintptr_t stream);

 private:
  std::vector<Signature> forms_;
  std::deque<Layout> layouts_;
  std::vector<Tensor> tensors_;
  std::vector<const void*> addresses_;
  std::vector<Site> sites_;
  bool wide_ = false;
};

}  // namespace pysmooth::cuda

// clip_grad_norm_ and get_total_norm for gradients on one GPU: the pipeline with the rule "scale",
// over gradients alone. What does not change from call to call is kept, as in StepPlan.
#pragma once

#include <deque>
#include <optional>

#include "bindings/tensor_reader.h"
#include "cuda/launch.h"

namespace pysmooth::cuda {

class ClipPlan {
 public:
  // Raises Unsupported for gradients that these kernels do not take.
  ClipPlan(const py::list& grads, double norm_type);

  const DevicePlan& device_plan() const { return *plan_; }
  void upload(uintptr_t memory, uintptr_t stream);
  bool is_wide() const { return wide_; }  // a gradient is float64

  // Enqueues `part` of the call; false: gradients have other forms than the plan's, and nothing
  // happened. `writes` says whether they are to be scaled in the end: if so they are looked at for
  // elements that would be scaled twice. `inputs`: input_bytes() of device memory.
  bool run(const py::list& grads, double max_norm, Part part, bool writes, uintptr_t inputs,
           uintptr_t stream);

 private:
  bool gather(const py::list& grads);

  std::vector<Signature> forms_;
  std::deque<Layout> layouts_;
  std::vector<Tensor> tensors_;
  std::vector<const void*> addresses_;
  std::optional<DevicePlan> plan_;
  int device_ = -1;
  bool wide_ = false;
  char* memory_ = nullptr;
};

}  // namespace pysmooth::cuda

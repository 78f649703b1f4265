// What the host calls: a plan's steps on a CUDA stream. No Python, no torch; nothing here waits for
// the device, and nothing allocates: memory comes from the caller.
//
//   DevicePlan plan(tensors, groups, settings)       device_plan.h
//   device = plan.bytes() of device memory; upload(plan, device, stream)
//   inputs = plan.input_bytes() of device memory, 8-byte aligned: one for eager steps, another one
//            for each captured graph
//   every step: step(plan, device, inputs, grads, groups, numbers, stream)
//
// A function returns 0, or a CUDA error code for error_name(). Steps of one plan must not overlap:
// they share what kernels leave to each other. Results (norms, whether the step was skipped) are in
// device memory, at plan.norms_at() and so on; what became of step n is there until step n + 1.
//
// A plan that replaces another one takes over `started` (plan.started_at()) where the tensors are
// the same and their states were not loaded or replaced: whether a first step was applied or
// skipped, the host does not know.
#pragma once

#include "cuda/device_plan.h"

namespace pysmooth::cuda {

// Whether a step is one cooperative launch, where its kernel can do it (DevicePlan::single_kernel)
// and the device takes such launches: never; where all that a step touches fits in the L2 cache; or
// always. Asks the device once, so that steps need not.
enum class SingleLaunch { never, in_cache, always };
int allow_single(DevicePlan* plan, int device, SingleLaunch when);

int upload(const DevicePlan& plan, void* device, void* stream);

// `grads`: of each tensor, null for one that sits out; `groups`: one per group. Host memory, read
// before this returns. Addresses in `groups` and `numbers` are device memory, read by kernels.
// `phase`: of a plan whose tensors lie on several devices, which is run phase by phase on all of
// them (device_plan.h). The first one writes the inputs.
int step(const DevicePlan& plan, void* device, void* inputs, const void* const* grads,
         const GroupInput* groups, const StepInput& numbers, void* stream, Part part = Part::whole,
         int phase = 0);

// Takes a gradient into its tensor's states, where the plan says that they absorb. Other tensors
// may take one in at the same time, on other streams.
int absorb(const DevicePlan& plan, void* device, const Intake& gradient, void* stream);

int multiprocessors(int device, int* count);
int device_count(int* count);
const char* error_name(int error);
const char* error_text(int error);

}  // namespace pysmooth::cuda

#include "cuda/launch.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>

#include "cuda/kernels.h"

namespace pysmooth::cuda {
namespace {

cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

template <int kWords>
cudaError_t put(PutKernel<kWords> kernel, char* at, const char* from, size_t bytes,
                cudaStream_t stream) {
  for (size_t done = 0; done < bytes; done += 8 * kWords) {
    Payload<kWords> payload;
    const size_t n = std::min<size_t>(8 * kWords, bytes - done);
    std::memcpy(payload.word, from + done, n);
    auto* to = reinterpret_cast<uint64_t*>(at + done);
    int words = static_cast<int>((n + 7) / 8);
    void* arguments[] = {&to, &words, &payload};
    const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(1),
                                               dim3(kThreads), arguments, 0, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t launch(View* view, Launch* one, void* stream) {
  void* arguments[] = {view, &one->work};
  return cudaLaunchKernel(reinterpret_cast<const void*>(one->kernel),
                          dim3(static_cast<unsigned>(one->blocks)), dim3(kThreads), arguments, 0,
                          stream_of(stream));
}

// The step's numbers, in launches of their own.
cudaError_t put_inputs(void* inputs, const std::vector<char>& bytes, cudaStream_t stream) {
  char* const to = static_cast<char*>(inputs);
  return bytes.size() <= 8 * kFewWords
             ? put<kFewWords>(kernels().put_few, to, bytes.data(), bytes.size(), stream)
             : put<kManyWords>(kernels().put_many, to, bytes.data(), bytes.size(), stream);
}

// In one launch, which takes the step's numbers along if they are few.
cudaError_t launch_single(Single one, View view, void* inputs, const std::vector<char>& bytes,
                          cudaStream_t stream) {
  Carried carried;
  carried.at = static_cast<uint64_t*>(inputs);
  carried.words = static_cast<int>((bytes.size() + 7) / 8);
  if (carried.words <= kCarriedWords) {
    std::memcpy(carried.payload.word, bytes.data(), bytes.size());
  } else {
    const cudaError_t error = put_inputs(inputs, bytes, stream);
    if (error != cudaSuccess) return error;
    carried.words = 0;
  }
  void* arguments[] = {&view, &one.reducing, &one.applying, &carried};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(one.kernel),
                                     dim3(static_cast<unsigned>(one.blocks)), dim3(kThreads),
                                     arguments, 0, stream);
}

// Of a kernel that is launched cooperatively, how many blocks are on the device at the same time.
// CUDA says that of the current device only.
cudaError_t count_resident(SingleKernel kernel, int device, int* blocks) {
  int before = 0, each = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &each, reinterpret_cast<const void*>(kernel), kThreads, 0);
  const cudaError_t back = cudaSetDevice(before);
  if (error == cudaSuccess) error = back;
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  *blocks = each * processors;
  return error;
}

}  // namespace

int allow_single(DevicePlan* plan, int device, SingleLaunch when) {
  const SingleKernel kernel = plan->single_kernel();
  if (kernel == nullptr || when == SingleLaunch::never) return cudaSuccess;
  int cooperates = 0, cache = 0, blocks = 0;
  cudaError_t error = cudaDeviceGetAttribute(&cooperates, cudaDevAttrCooperativeLaunch, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device);
  if (error != cudaSuccess || cooperates == 0) return error;
  if (when == SingleLaunch::in_cache && plan->streamed_bytes() > cache) return cudaSuccess;
  error = count_resident(kernel, device, &blocks);
  if (error == cudaSuccess) plan->run_single(blocks);
  return error;
}

int upload(const DevicePlan& plan, void* device, void* stream) {
  const std::vector<char> image = plan.image();
  return cudaMemcpyAsync(device, image.data(), image.size(), cudaMemcpyHostToDevice,
                         stream_of(stream));
}

int step(const DevicePlan& plan, void* device, void* inputs, const void* const* grads,
         const GroupInput* groups, const StepInput& numbers, void* stream, Part part, int phase) {
  if (part != Part::rest && phase == 0) {
    const std::vector<char> bytes = plan.inputs(grads, groups, numbers);
    if (plan.is_single(part))
      return launch_single(plan.single(device, groups), plan.view(device, inputs, groups), inputs,
                           bytes, stream_of(stream));
    const cudaError_t error = put_inputs(inputs, bytes, stream_of(stream));
    if (error != cudaSuccess) return error;
  }
  View view = plan.view(device, inputs, groups);
  for (Launch& one : plan.launches(device, groups, part, phase)) {
    const cudaError_t error = launch(&view, &one, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

int absorb(const DevicePlan& plan, void* device, const Intake& gradient, void* stream) {
  DevicePlan::Absorption work = plan.absorption(static_cast<size_t>(gradient.tensor));
  View view = plan.absorbing_view(device);
  Intake intake = gradient;
  void* admitted[] = {&view, &work.admitted, &intake};
  const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(work.admit),
                                             dim3(static_cast<unsigned>(work.admitted.blocks)),
                                             dim3(kThreads), admitted, 0, stream_of(stream));
  return error != cudaSuccess ? error : launch(&view, &work.pass, stream);
}

int multiprocessors(int device, int* count) {
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

int device_count(int* count) { return cudaGetDeviceCount(count); }

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

const char* error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }

}  // namespace pysmooth::cuda

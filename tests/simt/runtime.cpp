// The stub of the CUDA runtime: device memory is host memory, launches run in the emulation.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "cuda/kernels.h"

namespace {

using namespace pysmooth::cuda;

// What the device says of itself.
struct Device {
  int multiprocessors = 132, resident = 1, cache = 50 << 20, cooperates = 1, current = 0;
};
Device device;
long launches = 0, uploads = 0, downloads = 0;
std::map<void*, long> launches_on;
void* last_stream = nullptr;
std::string wrong = "";
bool captures = false, drops = false;
std::vector<std::function<void()>> captured;

template <class T>
T& argument(void** arguments, int i) {
  return *static_cast<T*>(arguments[i]);
}

// A launch with the arguments as they are now.
template <int kWords>
std::function<void()> bound_put(PutKernel<kWords> kernel, void** arguments) {
  return [kernel, at = argument<uint64_t*>(arguments, 0), words = argument<int>(arguments, 1),
          payload = argument<Payload<kWords>>(arguments, 2)] { kernel(at, words, payload); };
}
std::function<void()> bound(const void* kernel, void** arguments) {
  const auto is = [kernel](auto known) { return kernel == reinterpret_cast<const void*>(known); };
  if (is(kernels().put_few)) return bound_put<kFewWords>(kernels().put_few, arguments);
  if (is(kernels().put_many)) return bound_put<kManyWords>(kernels().put_many, arguments);
  if (is(kernels().admit))
    return [view = argument<View>(arguments, 0), work = argument<Work>(arguments, 1),
            intake = argument<Intake>(arguments, 2)] { kernels().admit(view, work, intake); };
  for (const auto& of_rule : kernels().single)
    if (std::any_of(std::begin(of_rule), std::end(of_rule), is))
      return [run = reinterpret_cast<SingleKernel>(const_cast<void*>(kernel)),
              view = argument<View>(arguments, 0), reducing = argument<Work>(arguments, 1),
              applying = argument<Work>(arguments, 2), carried = argument<Carried>(arguments, 3)] {
        run(view, reducing, applying, carried);
      };
  if (std::any_of(std::begin(kernels().codec), std::end(kernels().codec), is))
    return [run = reinterpret_cast<CodecKernel>(const_cast<void*>(kernel)),
            coding = argument<Coding>(arguments, 0)] { run(coding); };
  return [run = reinterpret_cast<Kernel>(const_cast<void*>(kernel)),
          view = argument<View>(arguments, 0),
          work = argument<Work>(arguments, 1)] { run(view, work); };
}

cudaError_t launch(const void* kernel, dim3 grid, dim3 threads, void** arguments, bool cooperative,
                   cudaStream_t stream) {
  if (grid.x == 0 || threads.x == 0) return cudaErrorInvalidValue;
  ++launches;
  ++launches_on[stream];
  last_stream = stream;
  if (drops) return cudaSuccess;
  const auto run = [grid, threads, cooperative, once = bound(kernel, arguments)] {
    simt::launch(grid, threads.x, cooperative, once);
  };
  if (captures) {
    captured.push_back(run);
    return cudaSuccess;
  }
  run();
  wrong = simt::take_error();
  return wrong.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 threads, void** arguments,
                             size_t /*shared_bytes*/, cudaStream_t stream) {
  return launch(kernel, grid, threads, arguments, false, stream);
}

// As CUDA: a grid that is not on the device as a whole is refused.
cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 grid, dim3 threads,
                                        void** arguments, size_t /*shared_bytes*/,
                                        cudaStream_t stream) {
  if (static_cast<int>(grid.x) > device.resident * device.multiprocessors)
    return cudaErrorCooperativeLaunchTooLarge;
  return launch(kernel, grid, threads, arguments, true, stream);
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* /*kernel*/,
                                                          int /*threads*/,
                                                          size_t /*shared_bytes*/) {
  *blocks = device.resident;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  ++(kind == cudaMemcpyHostToDevice ? uploads : downloads);
  last_stream = stream;
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  *value = attribute == cudaDevAttrL2CacheSize         ? device.cache
           : attribute == cudaDevAttrCooperativeLaunch ? device.cooperates
                                                       : device.multiprocessors;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* number) {
  *number = device.current;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int number) {
  device.current = number;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t /*error*/) { return wrong.c_str(); }
const char* cudaGetErrorString(cudaError_t /*error*/) { return wrong.c_str(); }

// What was called so far: launches, copies to the device and from it.
extern "C" __attribute__((visibility("default"))) void runtime_calls(long* out) {
  out[0] = launches;
  out[1] = uploads;
  out[2] = downloads;
}
extern "C" __attribute__((visibility("default"))) void* runtime_stream() { return last_stream; }
extern "C" __attribute__((visibility("default"))) long runtime_launches_on(void* stream) {
  return launches_on[stream];
}

// What the device says of itself from now on.
extern "C" __attribute__((visibility("default"))) void runtime_device(int multiprocessors,
                                                                      int resident, int cache,
                                                                      int cooperates) {
  device = {multiprocessors, resident, cache, cooperates, 0};
}
extern "C" __attribute__((visibility("default"))) int runtime_current_device() {
  return device.current;
}

// How the kernels of launches are run from now on.
extern "C" __attribute__((visibility("default"))) void runtime_options(int order, int resident,
                                                                       int races) {
  simt::options() = {static_cast<simt::Order>(order), 1, resident, races != 0};
}

// As a graph is captured and replayed: launches are kept, with their arguments, instead of run.
extern "C" __attribute__((visibility("default"))) void runtime_capture(int on) {
  captures = on != 0;
  if (captures) captured.clear();
}
// Launches are counted from now on, and nothing else: what is left is the cost of the caller.
extern "C" __attribute__((visibility("default"))) void runtime_drop(int on) { drops = on != 0; }
extern "C" __attribute__((visibility("default"))) void runtime_replay() {
  for (const auto& run : captured) run();
  wrong = simt::take_error();
}

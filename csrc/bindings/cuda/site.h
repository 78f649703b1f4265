// One device of a plan: what is launched there, and its memory.
#pragma once

#include <stdexcept>
#include <vector>

#include "cuda/launch.h"

namespace pysmooth::cuda {

// Raises RuntimeError for a code of CUDA's that is an error.
void check(int error, const char* what);

// When plans that are made from now on step in one launch: as PYSMOOTH_CUDA_SINGLE says (0: never,
// 1: always), else where it fits in the cache.
SingleLaunch& single_launch();

class Site {
 public:
  Site(const std::vector<Tensor>& tensors, int groups, const Settings& settings, int device)
      : plan_(tensors, groups, settings), device_(device) {}

  const DevicePlan& plan() const { return plan_; }
  void allow_single(SingleLaunch when) {
    check(cuda::allow_single(&plan_, device_, when), "cudaOccupancyMaxActiveBlocks");
  }
  int device() const { return device_; }
  void upload(uintptr_t memory, uintptr_t stream) {
    memory_ = reinterpret_cast<char*>(memory);
    check(cuda::upload(plan_, memory_, reinterpret_cast<void*>(stream)), "upload");
  }
  char* memory() const {
    if (memory_ == nullptr) throw std::logic_error("Plan: upload() comes first");
    return memory_;
  }

 private:
  DevicePlan plan_;
  int device_;
  char* memory_ = nullptr;
};

// A site for each of the `devices`, by number; tensors say at which one they are.
inline std::vector<Site> make_sites(const std::vector<Tensor>& tensors, int groups,
                                    Settings settings, const std::vector<int>& devices) {
  std::vector<Site> out;
  settings.sites = static_cast<int>(devices.size());
  for (settings.site = 0; settings.site < settings.sites; ++settings.site) {
    const int device = devices[static_cast<size_t>(settings.site)];
    check(multiprocessors(device, &settings.multiprocessors), "cudaDeviceGetAttribute");
    out.emplace_back(tensors, groups, settings, device);
    out.back().allow_single(single_launch());
  }
  return out;
}

}  // namespace pysmooth::cuda

#include "cuda/runtime.hpp"

#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "cuda/launch.hpp"

namespace hqq::cuda {

void check(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // errors that are not sticky are forgotten
  const char* name = std::strrchr(file, '/');
  const Status status =
      error == cudaErrorMemoryAllocation ? Status::kOutOfMemory : Status::kCudaError;
  throw Failure(status, std::string(name == nullptr ? file : name + 1) + ":" +
                            std::to_string(line) + ": " + call + ": " + cudaGetErrorString(error) +
                            " (" + cudaGetErrorName(error) + ")");
}

void allow_shared_bytes(const void* kernel, std::size_t bytes) {
  constexpr std::size_t kAlwaysAllowed = 48 * 1024;
  if (bytes <= kAlwaysAllowed) return;
  int device = 0;
  HQQ_CUDA_CHECK(cudaGetDevice(&device));
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, std::size_t> allowed;
  const std::lock_guard lock(mutex);
  std::size_t& most = allowed[{device, kernel}];
  if (bytes <= most) return;
  HQQ_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(bytes)));
  most = bytes;
}

const DeviceTraits& current_device() {
  constexpr int kMaxDevices = 64;
  static std::array<std::once_flag, kMaxDevices> once;
  static std::array<DeviceTraits, kMaxDevices> traits;
  int device = 0;
  HQQ_CUDA_CHECK(cudaGetDevice(&device));
  if (device < 0 || device >= kMaxDevices) {
    throw Failure(Status::kUnsupported, "device " + std::to_string(device) + " is beyond the " +
                                            std::to_string(kMaxDevices) + " that are supported");
  }
  const auto index = static_cast<std::size_t>(device);
  std::call_once(once[index], [&] {
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      HQQ_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
      return value;
    };
    traits[index].compute = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                            attribute(cudaDevAttrComputeCapabilityMinor);
    traits[index].multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
    traits[index].max_shared_bytes =
        static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  });
  return traits[index];
}

}  // namespace hqq::cuda

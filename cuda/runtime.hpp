// Host side of the CUDA library: errors, launches, and memory of one call.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/api.hpp"

namespace hqq::cuda {

// What entry.cu turns into a Status and a text.
class Failure : public std::runtime_error {
 public:
  Failure(Status status, const std::string& text) : std::runtime_error(text), status(status) {}
  const Status status;
};

// Throws Failure for anything but cudaSuccess. `call` is the text of the call.
void check(cudaError_t error, const char* call, const char* file, int line);
#define HQQ_CUDA_CHECK(call) ::hqq::cuda::check((call), #call, __FILE__, __LINE__)

struct LaunchShape {
  dim3 grid;
  dim3 block;
  std::size_t shared_bytes = 0;
};

// Lets a kernel have that much shared memory on the current device; more than 48 KB must be asked
// for, once.
void allow_shared_bytes(const void* kernel, std::size_t bytes);

// kernel<<<shape>>>(args...).
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, StreamHandle stream,
            Args... args) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  allow_shared_bytes(reinterpret_cast<const void*>(kernel), shape.shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  HQQ_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Params(args)...));
}

inline std::int64_t div_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return div_up(a, b) * b; }

// Properties of the current device that kernels are chosen by; asked for once a device.
struct DeviceTraits {
  int compute;  // 80 for 8.0
  int multiprocessors;
  std::size_t max_shared_bytes;  // a block may ask for
};
const DeviceTraits& current_device();

}  // namespace hqq::cuda

// Host side of the CUDA library: errors, and properties of the device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/api.hpp"

namespace hqq::cuda {

// What entry.cpp turns into a Status and a text.
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

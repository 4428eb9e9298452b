// Launches of kernels, for .cu files.
#pragma once

#include "cuda/runtime.hpp"

namespace hqq::cuda {

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

}  // namespace hqq::cuda

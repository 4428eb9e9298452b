// The instances of the linear kernels. Each pair of planes is a source file of its own
// (kernels_*.cu), so that they compile side by side.
#pragma once

#include <cstdint>

#include "cuda/device/linear/params.hpp"
#include "cuda/linear/choose.hpp"
#include "cuda/runtime.hpp"

namespace hqq::cuda {

struct LinearLaunch {
  DType x_type;
  int axis;
  LinearKernel kernel;
  device::LinearParams params;
  LaunchShape shape;
  StreamHandle stream;
};

// The instance for a width.
void launch_linear(BitWidth width, const LinearLaunch& launch);

// What kernels_*.cu instantiate.
template <int kLow, int kHigh>
void launch_linear(const LinearLaunch& launch);

// Writes x to `out` as gemm_kernel wants it, for `experts` experts of about `rows` rows.
void prepare_x(DType x_type, const device::LinearParams& params, const device::PrepareArgs& out,
               std::int64_t experts, std::int64_t rows, StreamHandle stream);

}  // namespace hqq::cuda

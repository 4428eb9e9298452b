// The instances of the fused kernels. Each pair of planes is a source file of its own
// (linear_*.cu), so that they compile side by side.
#pragma once

#include "cuda/choose.hpp"
#include "cuda/device/linear.hpp"

namespace hqq::cuda {

using LinearLauncher = void(DType x_type, int axis, LinearKernel kernel,
                            const device::LinearParams& params, const LaunchShape& shape,
                            StreamHandle stream);
LinearLauncher launch_linear_8, launch_linear_6, launch_linear_5, launch_linear_4, launch_linear_3,
    launch_linear_2, launch_linear_1;

inline void launch_linear(const FusedMatrix& weight, LinearKernel kernel,
                          const device::LinearParams& params, const LaunchShape& shape,
                          StreamHandle stream) {
  const auto run = [&](LinearLauncher& launcher) {
    launcher(weight.x_type, weight.layout.axis, kernel, params, shape, stream);
  };
  switch (weight.width) {
    case BitWidth::k8:
      return run(launch_linear_8);
    case BitWidth::k6:
      return run(launch_linear_6);
    case BitWidth::k5:
      return run(launch_linear_5);
    case BitWidth::k4:
      return run(launch_linear_4);
    case BitWidth::k3:
      return run(launch_linear_3);
    case BitWidth::k2:
    case BitWidth::kTernary:
      return run(launch_linear_2);
    case BitWidth::k1:
      return run(launch_linear_1);
  }
  throw Failure(Status::kUnsupported, "there is no fused kernel for bit width number " +
                                          std::to_string(static_cast<int>(weight.width)));
}

}  // namespace hqq::cuda

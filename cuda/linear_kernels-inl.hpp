// The body of linear_*.cu.
#pragma once

#include "cuda/device/decode.hpp"
#include "cuda/device/gemm.hpp"
#include "cuda/linear_kernels.hpp"

namespace hqq::cuda {

using LinearFunction = void (*)(device::LinearParams);

// Null: there is no such instance.
template <class T, int kLow, int kHigh>
LinearFunction linear_function(int axis, LinearKernel kernel) {
  using device::Scaling;
  if (axis == 1) {
    switch (kernel) {
      case LinearKernel::kDecode8:
        return device::decode_kernel<T, kLow, kHigh, Scaling::kSums, 1>;
      case LinearKernel::kDecode16:
        return device::decode_kernel<T, kLow, kHigh, Scaling::kSums, 2>;
      case LinearKernel::kGemm:
        return device::gemm_kernel<T, kLow, kHigh, Scaling::kRows>;
    }
  }
  switch (kernel) {
    case LinearKernel::kDecode8:
      return device::decode_kernel<T, kLow, kHigh, Scaling::kColumns, 1>;
    case LinearKernel::kDecode16:
      return nullptr;
    case LinearKernel::kGemm:
      return device::gemm_kernel<T, kLow, kHigh, Scaling::kColumns>;
  }
  return nullptr;
}

template <int kLow, int kHigh>
void launch_planes(DType x_type, int axis, LinearKernel kernel, const device::LinearParams& params,
                   const LaunchShape& shape, StreamHandle stream) {
  const LinearFunction function = x_type == DType::kF16
                                      ? linear_function<device::F16, kLow, kHigh>(axis, kernel)
                                      : linear_function<device::BF16, kLow, kHigh>(axis, kernel);
  if (function == nullptr) {
    throw Failure(Status::kUnsupported, "there is no fused kernel number " +
                                            std::to_string(static_cast<int>(kernel)) +
                                            " for axis " + std::to_string(axis));
  }
  launch(function, shape, stream, params);
}

}  // namespace hqq::cuda

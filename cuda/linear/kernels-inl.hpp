// The body of kernels_*.cu.
#pragma once

#include <string>

#include "cuda/device/linear/decode.hpp"
#include "cuda/device/linear/gemm.hpp"
#include "cuda/launch.hpp"
#include "cuda/linear/kernels.hpp"

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
void launch_linear(const LinearLaunch& what) {
  const LinearFunction function =
      what.x_type == DType::kF16
          ? linear_function<device::F16, kLow, kHigh>(what.axis, what.kernel)
          : linear_function<device::BF16, kLow, kHigh>(what.axis, what.kernel);
  if (function == nullptr) {
    throw Failure(Status::kUnsupported, "there is no linear kernel number " +
                                            std::to_string(static_cast<int>(what.kernel)) +
                                            " for axis " + std::to_string(what.axis));
  }
  launch(function, what.shape, what.stream, what.params);
}

}  // namespace hqq::cuda

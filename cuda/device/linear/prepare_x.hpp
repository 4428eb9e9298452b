// x for gemm_kernel, where it is not aligned or has column scales.
#pragma once

#include <cstdint>

#include "cuda/device/linear/tokens.hpp"

namespace hqq::cuda::device {

// Writes args.out [rows, out_stride].
template <class T>
__global__ void prepare_x_kernel(LinearParams p, PrepareArgs args) {
  const int expert = static_cast<int>(blockIdx.z);
  const Tokens all = tokens_of(p, expert);
  const auto col = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (col >= args.out_stride) return;
  const unsigned char* col_scale = col < p.K ? col_scale_of(p, expert) : nullptr;
  const float scale = col_scale == nullptr ? 1.0f : load_float(p.col_scale_type, col_scale, col);
  for (std::int64_t token = all.begin + blockIdx.y; token < all.end; token += gridDim.y) {
    std::uint16_t value = 0;
    if (col < p.K) {
      value = ld_global(p.x + token * p.x_stride + col);
      if (col_scale != nullptr) value = T::from_float(T::to_float(value) * scale);
    }
    st_global(args.out + token * args.out_stride + col, value);
  }
}

}  // namespace hqq::cuda::device

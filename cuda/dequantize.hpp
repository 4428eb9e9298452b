// Launches of the kernels in device/dequantize.hpp.
#pragma once

#include "cuda/api.hpp"

namespace hqq::cuda {

// W_r [rows, cols] as `type` (kF32, kF16, kBF16, kF64) to out, or only the rows `ids` [count].
void dequantize(const DeviceMatrix& q, void* out, DType type, StreamHandle stream);
void dequantize_rows(const DeviceMatrix& q, const std::int64_t* ids, std::int64_t count, void* out,
                     DType type, StreamHandle stream);

}  // namespace hqq::cuda

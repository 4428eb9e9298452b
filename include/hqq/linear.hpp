// y = x W_r^T + bias.
#pragma once

#include "hqq/quantized_tensor.hpp"
#include "hqq/quantizer.hpp"

namespace hqq {

// y [M, out_features] = x [M, in_features] W_r^T + bias [out_features] (empty: none). Sums are
// float32. A few rows of x are multiplied with W_r row by row as it is dequantized, many with W_r
// as a whole. Throws std::invalid_argument when the sizes do not fit.
RowMajorMatrix linear(const Eigen::Ref<const RowMajorMatrix>& x, const QuantizedTensor& q,
                      std::span<const float> bias = {}, int threads = 0);

// The same for rows of float32, bfloat16, float16 or float64. y is [M, out_features] in the type of
// x; the caller owns its memory.
void linear(const TensorView& x, const QuantizedTensor& q, std::span<const float> bias, void* y,
            int threads = 0);

}  // namespace hqq

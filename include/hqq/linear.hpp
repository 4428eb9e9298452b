// y = x W_r^T + bias.
#pragma once

#include "hqq/quantized_tensor.hpp"
#include "hqq/quantizer.hpp"

namespace hqq {

// y [M, out_features] = x [M, in_features] W_r^T + bias [out_features] (empty: none), by dequantizing W_r
// and a dense product. Throws std::invalid_argument when the sizes do not fit.
RowMajorMatrix linear(const Eigen::Ref<const RowMajorMatrix>& x, const QuantizedTensor& q,
                      std::span<const float> bias = {}, int threads = 0);

}  // namespace hqq

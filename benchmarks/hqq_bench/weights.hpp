// Weights of the cases. Each function keeps its last result: cases of the same weights follow each
// other, and Google Benchmark runs every case several times.
#pragma once

#include <cstdint>
#include <vector>

#include "hqq/linear.hpp"
#include "hqq/quantized_tensor.hpp"
#include "hqq/tiled_tensor.hpp"

namespace hqq::bench {

// Normally distributed, float32 [size, size].
const Tensor& dense_weights(std::int64_t size);

const QuantizedTensor& quantized_weights(const LayerConfig& config, std::int64_t size);

// So many copies that they fill no cache. Products walk through them, as through the layers of a
// model.
const std::vector<TiledTensor>& tiled_copies(const LayerConfig& config, std::int64_t size);
// The same as layers on a GPU.
const std::vector<Linear>& layer_copies(const LayerConfig& config, std::int64_t size,
                                        const Device& device);

}  // namespace hqq::bench

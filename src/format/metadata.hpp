// Stored scales and zeros: rounding to 16 bits, 8-bit codes, and reading them back as float32.
// Shared by all backends.
#pragma once

#include <span>
#include <vector>

#include "hqq/quantized_tensor.hpp"

namespace hqq {

// Stores the values of groups [begin, begin + values.size()) in `codes` (meta_dtype, or uint8 with
// one step and offset per block), and writes them as they will be read back. `begin` is a multiple
// of core::kMetadataBlock.
void store_metadata(std::span<const float> values, std::size_t begin, Tensor& codes, Tensor& step,
                    Tensor& offset, float* read_back);
// Stored values as float32: those of groups [begin, begin + out.size()), or all.
void read_metadata(const Tensor& codes, const Tensor& step, const Tensor& offset, std::size_t begin,
                   std::span<float> out);
std::vector<float> read_metadata(const Tensor& codes, const Tensor& step, const Tensor& offset);
std::vector<float> read_scale(const QuantizedTensor& q);
std::vector<float> read_zero(const QuantizedTensor& q);

}  // namespace hqq

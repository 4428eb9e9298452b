// W_r from tiles: all rows, or some of them.
#pragma once

#include "src/backend.hpp"

namespace hqq::cpu {

// W_r [out_features, in_features] of any weight dtype; the same values as cpu::dequantize.
void dequantize_tiles(const TiledTensor& q, DType dtype, std::byte* out, int threads);

// Rows of the weight of `task` (nothing else of it is read), [rows.size(), in_features].
void dequantize_some_rows(const LinearTask& task, std::span<const std::int64_t> rows, DType dtype,
                          std::byte* out);

}  // namespace hqq::cpu

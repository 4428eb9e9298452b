// Final codes from stored scale and zero, packed; and the way back.
#pragma once

#include <cstdint>

#include "hqq/core/codec.hpp"
#include "hqq/core/params.hpp"
#include "src/cpu/quantize/group_source.hpp"

namespace hqq::cpu {

// Scale and zero of every group as float32, with 1 / scale.
struct GroupValues {
  const float* scale;
  const float* inv_scale;  // null for dequantization
  const float* zero;
};

struct EncodeArgs {
  GroupSource source;
  GroupValues values;
  core::RowFormat format;
  const float* col_scale = nullptr;  // [cols] or null
  std::uint8_t* packed = nullptr;    // [rows, row_bytes]
  std::int64_t row_bytes = 0;
  core::ErrorSums* errors = nullptr;  // [rows], with col_scale; null: nobody asks
};

void encode_row(const EncodeArgs& args, std::int64_t row);

struct DequantizeArgs {
  core::GroupLayout layout;
  GroupValues values;
  core::RowFormat format;
  const float* col_scale = nullptr;
  const std::uint8_t* packed = nullptr;
  std::int64_t row_bytes = 0;
};

// Row `row` of W_r as float32, [cols].
void dequantize_row(const DequantizeArgs& args, std::int64_t row, float* out);

// Number of NaN and Inf in a row; `first` gets the column of the first one.
std::int64_t count_nonfinite(const GroupSource& source, std::int64_t row, std::int64_t* first);

}  // namespace hqq::cpu

// Groups whose scale is too small for float16, and whether they spoil a matrix.
#pragma once

#include <span>
#include <string>

#include "hqq/config.hpp"
#include "hqq/core/group.hpp"
#include "hqq/tensor.hpp"

namespace hqq {

// Stored scales up to this are small; 0 where no type of the metadata underflows. Below 2^-14
// float16 holds multiples of 2^-24. Rounding a scale to one moves the ends of its group's range,
// and what lies there is clipped: by up to four steps at max_code / 16 multiples, which about
// doubles the error. The smallest itself may stand for anything below it.
float small_scale(const LayerConfig& config);

// Scale, zero and col_scale (empty: none) of a matrix as stored.
struct StoredMetadata {
  std::span<const float> scale, zero, col_scale;
};

// Throws std::invalid_argument if the squared errors of the groups with small scales are more than
// a millionth of the squared weights. Rows that are dead beside the others pass: a relative error
// of 0.001 is below that of 8 bits.
void refuse_small_scales(const std::string& name, const TensorView& W,
                         const core::GroupLayout& layout, const LayerConfig& config,
                         const StoredMetadata& stored, int threads);

}  // namespace hqq

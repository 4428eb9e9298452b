// Elements of any weight dtype as float or double.
#pragma once

#include <cstddef>
#include <span>

#include "hqq/dtype.hpp"

namespace hqq {

// Reads out.size() elements. `dtype` is one that is_weight_dtype() accepts; float64 is rounded to
// float.
void read_values(DType dtype, const std::byte* in, std::span<float> out);
void read_values(DType dtype, const std::byte* in, std::span<double> out);

}  // namespace hqq

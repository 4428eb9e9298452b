// Elements of any weight dtype as float or double.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "hqq/dtype.hpp"
#include "hqq/tensor.hpp"

namespace hqq {

// Reads out.size() elements. `dtype` is one that is_weight_dtype() accepts; float64 is rounded to
// float.
void read_values(DType dtype, const std::byte* in, std::span<float> out);
void read_values(DType dtype, const std::byte* in, std::span<double> out);

// A whole tensor.
std::vector<float> read_values(const Tensor& tensor);

// Writes values.size() elements, rounded half to even.
void write_values(std::span<const float> values, DType dtype, std::byte* out);

}  // namespace hqq

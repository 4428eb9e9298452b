// What every product checks before it begins.
#pragma once

#include <cstddef>
#include <cstdint>

#include "hqq/tensor.hpp"

namespace hqq {

// Both throw std::invalid_argument. `bias`: number of values, 0 for none.
void check_bias(std::size_t bias, std::int64_t out_features);
void check_operands(const TensorView& x, std::int64_t out_features, std::int64_t in_features,
                    std::size_t bias, int threads);

}  // namespace hqq

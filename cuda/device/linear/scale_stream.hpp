// The stream of scales and zeros that a kernel takes.
#pragma once

#include <type_traits>

#include "cuda/device/linear/column_scales.hpp"
#include "cuda/device/linear/row_scales.hpp"

namespace hqq::cuda::device {

template <class T, int kBits, Scaling kScaling>
using ScaleStream = std::conditional_t<kScaling == Scaling::kColumns,
                                       ColumnScaleStream<T, (1 << kBits) - 1>, RowScaleStream>;

}  // namespace hqq::cuda::device

#include "hqq/linear.hpp"

#include <algorithm>

#include "hqq/error.hpp"
#include "src/backend.hpp"
#include "src/float_values.hpp"

namespace hqq {
namespace {

// Up to this many rows of x, W_r is not written out: its memory traffic costs more than the simple
// product.
constexpr std::int64_t kFewRows = 8;

void check_sizes(std::int64_t cols, const QuantizedTensor& q, std::size_t bias) {
  if (cols != q.in_features) {
    throw_invalid("linear", "x has " + std::to_string(cols) + " columns; the layer takes " +
                                std::to_string(q.in_features));
  }
  if (bias > 0 && static_cast<std::int64_t>(bias) != q.out_features) {
    throw_invalid("linear", "bias has " + std::to_string(bias) + " values; the layer has " +
                                std::to_string(q.out_features) + " outputs");
  }
}

}  // namespace

RowMajorMatrix linear(const Eigen::Ref<const RowMajorMatrix>& x, const QuantizedTensor& q,
                      std::span<const float> bias, int threads) {
  check_sizes(x.cols(), q, bias.size());
  RowMajorMatrix y;
  if (x.rows() <= kFewRows) {
    y.resize(x.rows(), q.out_features);
    linear(TensorView(x.data(), DType::kF32, x.rows(), x.cols(), x.outerStride()), q, bias,
           y.data(), threads);
    return y;
  }
  y = x * dequantize_matrix(q, threads).transpose();
  if (!bias.empty()) {
    y.rowwise() +=
        Eigen::Map<const Eigen::RowVectorXf>(bias.data(), static_cast<Eigen::Index>(bias.size()));
  }
  return y;
}

void linear(const TensorView& x, const QuantizedTensor& q, std::span<const float> bias, void* y,
            int threads) {
  check_sizes(x.cols, q, bias.size());
  if (!is_weight_dtype(x.dtype)) {
    throw_invalid("linear", "x is " + std::string(dtype_name(x.dtype)) +
                                "; it must be float32, float16, bfloat16 or float64");
  }
  if (x.rows == 0) return;
  q.validate("linear");
  threads = threads > 0 ? threads : default_threads();
  if (x.rows <= kFewRows) {
    cpu::linear({x, &q, bias, static_cast<std::byte*>(y), threads});
    return;
  }
  RowMajorMatrix values(x.rows, x.cols);
  const std::size_t row_bytes = static_cast<std::size_t>(x.row_stride) * dtype_size(x.dtype);
  for (std::int64_t m = 0; m < x.rows; ++m) {
    read_values(x.dtype,
                static_cast<const std::byte*>(x.data) + static_cast<std::size_t>(m) * row_bytes,
                std::span(values.row(m).data(), static_cast<std::size_t>(x.cols)));
  }
  const RowMajorMatrix product = linear(values, q, bias, threads);
  write_values(std::span(product.data(), static_cast<std::size_t>(product.size())), x.dtype,
               static_cast<std::byte*>(y));
}

}  // namespace hqq

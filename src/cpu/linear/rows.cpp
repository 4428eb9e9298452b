// Products with weights that have no tiles: every row of W_r is dequantized into a buffer that
// stays in the cache and multiplied with all rows of x, so that W_r never exists as a whole.
#include "src/cpu/linear/rows.hpp"

#include "hqq/bitpack.hpp"
#include "hqq/eigen.hpp"
#include "src/cpu/parallel.hpp"
#include "src/cpu/quantize/encode.hpp"
#include "src/format/float_values.hpp"
#include "src/format/metadata.hpp"

namespace hqq::cpu {
namespace {

// Rows of W_r a thread takes at a time.
constexpr std::int64_t kLinearUnitRows = 16;

// x in float32, times col_scale: folding it in here spares a product per weight.
RowMajorMatrix input_values(const LinearTask& task) {
  const TensorView& x = task.x;
  RowMajorMatrix values(x.rows, x.cols);
  const std::size_t row_bytes = static_cast<std::size_t>(x.row_stride) * dtype_size(x.dtype);
  for (std::int64_t m = 0; m < x.rows; ++m) {
    const std::byte* row =
        static_cast<const std::byte*>(x.data) + static_cast<std::size_t>(m) * row_bytes;
    read_values(x.dtype, row, std::span(values.row(m).data(), static_cast<std::size_t>(x.cols)));
  }
  if (task.q->col_scale) {
    const std::vector<float> col_scale = read_values(task.q->col_scale);
    values.array().rowwise() *=
        Eigen::Map<const Eigen::Array<float, 1, Eigen::Dynamic>>(col_scale.data(), x.cols);
  }
  return values;
}

}  // namespace

void linear_by_rows(const LinearTask& task, int threads) {
  const QuantizedTensor& q = *task.q;
  const RowMajorMatrix x = input_values(task);
  const std::vector<float> scale = read_scale(q);
  const std::vector<float> zero = read_zero(q);
  const DequantizeArgs args{q.layout(),
                            {scale.data(), nullptr, zero.data()},
                            core::row_format(q.config.nbits),
                            nullptr,
                            q.W_q.data<std::uint8_t>(),
                            packed_row_bytes(q.config.nbits, q.in_features)};
  RowMajorMatrix y(x.rows(), q.out_features);
  parallel_for((q.out_features + kLinearUnitRows - 1) / kLinearUnitRows, threads,
               [&](std::int64_t unit) {
                 Eigen::VectorXf weights(q.in_features);
                 const std::int64_t first = unit * kLinearUnitRows;
                 const std::int64_t end = std::min(q.out_features, first + kLinearUnitRows);
                 for (std::int64_t n = first; n < end; ++n) {
                   dequantize_row(args, n, weights.data());
                   const float bias = task.bias.empty() ? 0.0f : task.bias[std::size_t(n)];
                   for (std::int64_t m = 0; m < x.rows(); ++m) {
                     y(m, n) = x.row(m).dot(weights) + bias;
                   }
                 }
               });
  const std::size_t row_bytes = static_cast<std::size_t>(task.y_stride) * dtype_size(task.x.dtype);
  for (std::int64_t m = 0; m < y.rows(); ++m) {
    write_values(std::span(y.row(m).data(), static_cast<std::size_t>(y.cols())), task.x.dtype,
                 task.y + static_cast<std::size_t>(m) * row_bytes);
  }
}

}  // namespace hqq::cpu

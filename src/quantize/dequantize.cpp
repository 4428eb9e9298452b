// dequantize() and dequantize_rows() of both packings: checks and dispatch.
#include <cstring>

#include "hqq/error.hpp"
#include "hqq/quantizer.hpp"
#include "hqq/tiled_tensor.hpp"
#include "src/backend.hpp"
#include "src/cpu/linear/tiles/dequantize_tiles.hpp"

namespace hqq {
namespace {

void check_dtype(DType dtype) {
  if (is_weight_dtype(dtype)) return;
  throw_invalid("dequantize",
                std::string(dtype_name(dtype)) + " is not float32, float16, bfloat16 or float64");
}

void check_rows(std::span<const std::int64_t> rows, std::int64_t out_features) {
  for (std::int64_t row : rows) {
    if (row < 0 || row >= out_features) {
      throw_invalid("dequantize", "row " + std::to_string(row) + " does not exist; W has " +
                                      std::to_string(out_features) + " rows");
    }
  }
}

int threads_of(const DequantizeOptions& options) {
  return options.threads > 0 ? options.threads : default_threads();
}

}  // namespace

Tensor dequantize(const QuantizedTensor& q, const DequantizeOptions& options) {
  q.validate("dequantize");
  check_dtype(options.dtype);
  Tensor out = Tensor::allocate(options.dtype, {q.out_features, q.in_features});
  cpu::dequantize(q, out, threads_of(options));
  return out;
}

void dequantize(const QuantizedTensor& q, void* out, const DequantizeOptions& options) {
  q.validate("dequantize");
  check_dtype(options.dtype);
  const std::size_t size =
      static_cast<std::size_t>(q.out_features * q.in_features) * dtype_size(options.dtype);
  Tensor dense{options.dtype,
               {q.out_features, q.in_features},
               {nullptr, static_cast<std::byte*>(out), size}};
  cpu::dequantize(q, dense, threads_of(options));
}

void dequantize(const TiledTensor& q, void* out, const DequantizeOptions& options) {
  q.validate("dequantize");
  check_dtype(options.dtype);
  cpu::dequantize_tiles(q, options.dtype, static_cast<std::byte*>(out), threads_of(options));
}

void dequantize_rows(const TiledTensor& q, std::span<const std::int64_t> rows, void* out,
                     const DequantizeOptions& options) {
  q.validate("dequantize");
  check_rows(rows, q.out_features);
  check_dtype(options.dtype);
  LinearTask task;
  task.tiled = &q;
  cpu::dequantize_some_rows(task, rows, options.dtype, static_cast<std::byte*>(out));
}

void dequantize_rows(const QuantizedTensor& q, std::span<const std::int64_t> rows, void* out,
                     const DequantizeOptions& options) {
  q.validate("dequantize");
  check_rows(rows, q.out_features);
  check_dtype(options.dtype);
  if (can_tile(q.config, q.out_features, q.in_features)) {
    LinearTask task;
    task.q = &q;
    cpu::dequantize_some_rows(task, rows, options.dtype, static_cast<std::byte*>(out));
    return;
  }
  const Tensor dense = dequantize(q, options);
  const std::size_t row_bytes = dense.nbytes() / static_cast<std::size_t>(q.out_features);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    std::memcpy(static_cast<std::byte*>(out) + i * row_bytes,
                dense.buffer.data + static_cast<std::size_t>(rows[i]) * row_bytes, row_bytes);
  }
}

}  // namespace hqq

#include "hqq/linear.hpp"

#include <cstdlib>

#include "hqq/error.hpp"
#include "src/backend.hpp"
#include "src/base/quoted_text.hpp"
#include "src/linear/check.hpp"

namespace hqq {
namespace {

// The mode to use: never kAuto.
LinearMode resolve(LinearMode mode) {
  if (mode != LinearMode::kAuto) return mode;
  const char* text = std::getenv("HQQ_CPU_MODE");
  if (text == nullptr || *text == '\0') return LinearMode::kFast;
  const std::string name = text;
  if (name == "fast") return LinearMode::kFast;
  if (name == "exact") return LinearMode::kExact;
  throw_invalid("linear", "HQQ_CPU_MODE is " + quote_name(name) + "; it must be fast or exact");
}

const QuantizedTensor* as_rows(const QuantizedTensor& q) { return &q; }
const QuantizedTensor* as_rows(const TiledTensor&) { return nullptr; }
const TiledTensor* as_tiles(const QuantizedTensor&) { return nullptr; }
const TiledTensor* as_tiles(const TiledTensor& q) { return &q; }

template <class Weight>
void multiply(const TensorView& x, const Weight& q, std::span<const float> bias, void* y,
              const LinearOptions& options) {
  check_operands(x, q.out_features, q.in_features, bias.size(), options.threads);
  q.validate("linear");
  const LinearMode mode = resolve(options.mode);
  if (x.rows == 0) return;
  const LinearTask task{
      x, as_rows(q), as_tiles(q), bias, static_cast<std::byte*>(y), q.out_features, mode};
  cpu::linear({&task, 1}, options.threads > 0 ? options.threads : default_threads());
}

}  // namespace

void check_bias(std::size_t bias, std::int64_t out_features) {
  if (bias > 0 && static_cast<std::int64_t>(bias) != out_features) {
    throw_invalid("linear", "bias has " + std::to_string(bias) + " values; the layer has " +
                                std::to_string(out_features) + " outputs");
  }
}

void check_operands(const TensorView& x, std::int64_t out_features, std::int64_t in_features,
                    std::size_t bias, int threads) {
  if (x.cols != in_features) {
    throw_invalid("linear", "x has " + std::to_string(x.cols) + " columns; the layer takes " +
                                std::to_string(in_features));
  }
  if (x.row_stride < x.cols) {
    throw_invalid("linear", "x has row_stride " + std::to_string(x.row_stride) +
                                "; it must be at least " + std::to_string(x.cols));
  }
  check_bias(bias, out_features);
  if (!is_weight_dtype(x.dtype)) {
    throw_invalid("linear", "x is " + std::string(dtype_name(x.dtype)) +
                                "; it must be float32, float16, bfloat16 or float64");
  }
  if (threads < 0) {
    throw_invalid("linear", "threads is " + std::to_string(threads) + "; it must be >= 0");
  }
}

std::string to_string(LinearMode mode) {
  switch (mode) {
    case LinearMode::kFast:
      return "fast";
    case LinearMode::kExact:
      return "exact";
    default:
      return "auto";
  }
}

LinearMode linear_mode_from_string(const std::string& name) {
  for (LinearMode mode : {LinearMode::kAuto, LinearMode::kFast, LinearMode::kExact}) {
    if (name == to_string(mode)) return mode;
  }
  throw_invalid("linear", "mode is " + quote_name(name) + "; it must be auto, fast or exact");
}

LinearKernel linear_kernel(const PackedMatrix& q, std::int64_t rows, LinearMode mode) {
  return cpu::linear_kernel(q, rows, resolve(mode));
}

void linear(const TensorView& x, const TiledTensor& q, std::span<const float> bias, void* y,
            const LinearOptions& options) {
  multiply(x, q, bias, y, options);
}

void linear(std::span<const LinearCall> calls, const LinearOptions& options) {
  const LinearMode mode = resolve(options.mode);
  std::vector<LinearTask> tasks;
  tasks.reserve(calls.size());
  for (const LinearCall& call : calls) {
    if (call.q == nullptr) throw_invalid("linear", "a call has no weight");
    const TiledTensor& q = *call.q;
    check_operands(call.x, q.out_features, q.in_features, call.bias.size(), options.threads);
    q.validate("linear");
    const std::int64_t stride = call.y_stride == 0 ? q.out_features : call.y_stride;
    if (stride < q.out_features) {
      throw_invalid("linear", "y_stride is " + std::to_string(stride) + "; a row of y has " +
                                  std::to_string(q.out_features) + " values");
    }
    tasks.push_back(
        {call.x, nullptr, &q, call.bias, static_cast<std::byte*>(call.y), stride, mode});
  }
  cpu::linear(tasks, options.threads > 0 ? options.threads : default_threads());
}

void linear(const TensorView& x, const QuantizedTensor& q, std::span<const float> bias, void* y,
            const LinearOptions& options) {
  multiply(x, q, bias, y, options);
}

}  // namespace hqq

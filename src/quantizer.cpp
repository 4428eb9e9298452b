// Checks and dispatch: whatever reaches a backend from here is valid.
#include "hqq/quantizer.hpp"

#include <cmath>
#include <limits>

#include "hqq/error.hpp"
#include "src/backend.hpp"

namespace hqq {
namespace {

std::string where(const std::string& layer_name) {
  return layer_name.empty() ? "quantize" : layer_name;
}

void check_matrix(const TensorView& W, const std::string& name) {
  const std::string shape = shape_string({W.rows, W.cols});
  if (W.rows <= 0 || W.cols <= 0) throw_invalid(name, "W is " + shape + "; it must not be empty");
  if (!is_weight_dtype(W.dtype)) {
    throw_invalid(name, "W is " + std::string(dtype_name(W.dtype)) +
                            "; it must be float32, float16, bfloat16 or float64");
  }
  if (W.row_stride < W.cols) {
    throw_invalid(name, "row_stride " + std::to_string(W.row_stride) + " is less than the " +
                            std::to_string(W.cols) + " columns of W");
  }
  if (W.rows > std::numeric_limits<std::int64_t>::max() / 16 / W.row_stride) {
    throw_invalid(name, "W is " + shape + ", too large to address");
  }
  if (W.data == nullptr) throw_invalid(name, "W has no data");
}

void check_importance(std::span<const float> importance, const TensorView& W,
                      const std::string& name) {
  if (importance.empty()) return;
  if (static_cast<std::int64_t>(importance.size()) != W.cols) {
    throw_invalid(name, "importance has " + std::to_string(importance.size()) + " values; W has " +
                            std::to_string(W.cols) + " columns");
  }
  double sum = 0.0;
  for (std::size_t i = 0; i < importance.size(); ++i) {
    if (!std::isfinite(importance[i]) || importance[i] < 0.0f) {
      throw_invalid(name, "importance[" + std::to_string(i) + "] is " +
                              std::to_string(importance[i]) + "; it must be finite and >= 0");
    }
    sum += static_cast<double>(importance[i]);
  }
  if (sum == 0.0) throw_invalid(name, "importance is all zeros; at least one value must be > 0");
}

void check_dense_dtype(DType dtype) {
  if (is_weight_dtype(dtype)) return;
  throw_invalid("dequantize", "dtype " + std::string(dtype_name(dtype)) +
                                  " is not one of float32, float16, bfloat16, float64");
}

LayerConfig resolve(const LayerConfig& config, std::span<const float> importance) {
  LayerConfig resolved = config;
  resolved.validate();
  if (resolved.balance == Balance::kAuto) {
    resolved.balance = importance.empty() ? Balance::kSinkhorn : Balance::kNone;
  }
  return resolved;
}

}  // namespace

Quantizer::Quantizer(HqqConfig config, Device device)
    : config_(std::move(config)), device_(device) {
  config_.validate();
}

QuantizedTensor Quantizer::quantize(const TensorView& W, const std::string& layer_name,
                                    const QuantizeOptions& options) const {
  if (layer_name.empty()) return quantize(W, config_.defaults, layer_name, options);
  const std::optional<LayerConfig> layer = config_.layer(layer_name);
  if (!layer) {
    throw_invalid(layer_name,
                  "the config leaves this layer unquantized (skip_modules or "
                  "dynamic_config)");
  }
  return quantize(W, *layer, layer_name, options);
}

QuantizedTensor Quantizer::quantize(const Eigen::Ref<const RowMajorMatrix>& W,
                                    const std::string& layer_name,
                                    const QuantizeOptions& options) const {
  return quantize(TensorView(W.data(), DType::kF32, W.rows(), W.cols(), W.outerStride()),
                  layer_name, options);
}

QuantizedTensor Quantizer::quantize(const TensorView& W, const LayerConfig& config,
                                    const std::string& layer_name,
                                    const QuantizeOptions& options) const {
  const std::string name = where(layer_name);
  check_matrix(W, name);
  check_importance(options.importance, W, name);
  if (options.threads < 0) {
    throw_invalid(name, "threads is " + std::to_string(options.threads) + "; it must be >= 0");
  }
  QuantizedTensor q;
  q.config = resolve(config, options.importance);
  q.out_features = W.rows;
  q.in_features = W.cols;
  q.allocate();
  const QuantizeTask task{W,
                          q.config,
                          options.importance,
                          name,
                          options.threads > 0 ? options.threads : default_threads(),
                          options.stats};
  if (device_.kind == Device::Kind::kCuda) {
    cuda::quantize(task, q);
  } else {
    cpu::quantize(task, q);
  }
  return q;
}

Tensor dequantize(const QuantizedTensor& q, DType dtype, int threads) {
  q.validate("dequantize");
  check_dense_dtype(dtype);
  Tensor out = Tensor::allocate(dtype, {q.out_features, q.in_features});
  dequantize(q, dtype, out.buffer.data, threads);
  return out;
}

void dequantize(const QuantizedTensor& q, DType dtype, void* out, int threads) {
  q.validate("dequantize");
  check_dense_dtype(dtype);
  const Buffer memory{nullptr, static_cast<std::byte*>(out),
                      static_cast<std::size_t>(q.out_features * q.in_features) * dtype_size(dtype)};
  Tensor dense{dtype, {q.out_features, q.in_features}, memory};
  cpu::dequantize(q, dense, threads > 0 ? threads : default_threads());
}

RowMajorMatrix dequantize_matrix(const QuantizedTensor& q, int threads) {
  const Tensor dense = dequantize(q, DType::kF32, threads);
  return Eigen::Map<const RowMajorMatrix>(dense.data<float>(), q.out_features, q.in_features);
}

}  // namespace hqq

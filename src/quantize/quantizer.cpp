// Checks and dispatch: whatever reaches a backend from here is valid.
#include "hqq/quantizer.hpp"

#include "hqq/error.hpp"
#include "src/backend.hpp"
#include "src/quantize/quantize_input.hpp"

namespace hqq {
namespace {

void check_dense_dtype(DType dtype) {
  if (is_weight_dtype(dtype)) return;
  throw_invalid("dequantize", "dtype " + std::string(dtype_name(dtype)) +
                                  " is not one of float32, float16, bfloat16, float64");
}

}  // namespace

Quantizer::Quantizer(HqqConfig config, Device device)
    : config_(std::move(config)), device_(device) {
  config_.validate();
}

QuantizedTensor Quantizer::quantize(const TensorView& W, const std::string& layer_name,
                                    const QuantizeOptions& options) const {
  return quantize(W, layer_settings(config_, layer_name), layer_name, options);
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
  const std::string name = message_name(layer_name);
  check_shape(W, name);
  if (W.data == nullptr) throw_invalid(name, "W has no data");
  check_importance(options.importance, W, name);
  if (options.threads < 0) {
    throw_invalid(name, "threads is " + std::to_string(options.threads) + "; it must be >= 0");
  }
  QuantizedTensor q;
  q.config = resolve_settings(config, !options.importance.empty());
  q.out_features = W.rows;
  q.in_features = W.cols;
  q.allocate();
  const QuantizeTask task{W,
                          q.config,
                          options.importance,
                          name,
                          options.threads > 0 ? options.threads : default_threads(),
                          options.stats,
                          device_.index};
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

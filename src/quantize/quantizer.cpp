// Checks and dispatch: whatever reaches a backend from here is valid.
#include "hqq/quantizer.hpp"

#include "hqq/error.hpp"
#include "src/backend.hpp"
#include "src/quantize/quantize_input.hpp"

namespace hqq {
Quantizer::Quantizer(HqqConfig config, Device device)
    : config_(std::move(config)), device_(device) {
  config_.validate();
}

QuantizedTensor Quantizer::quantize(const TensorView& W, const std::string& layer_name,
                                    const QuantizeOptions& options) const {
  return quantize(W, layer_settings(config_, layer_name), layer_name, options);
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
  // No default: the compiler names a device that is missing.
  switch (device_.kind) {
    case Device::Kind::kCpu:
      cpu::quantize(task, q);
      break;
    case Device::Kind::kCuda:
      cuda::quantize(task, q);
      break;
  }
  return q;
}

}  // namespace hqq

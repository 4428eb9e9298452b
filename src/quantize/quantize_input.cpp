#include "src/quantize/quantize_input.hpp"

#include <cmath>
#include <cstdint>
#include <limits>

#include "hqq/error.hpp"
#include "src/model/balance.hpp"

namespace hqq {

std::string message_name(const std::string& layer_name) {
  return layer_name.empty() ? "quantize" : layer_name;
}

void check_shape(const TensorView& W, const std::string& name) {
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

LayerConfig layer_settings(const HqqConfig& config, const std::string& layer_name) {
  if (layer_name.empty()) return config.defaults;
  const std::optional<LayerConfig> layer = config.layer(layer_name);
  if (!layer) {
    throw_invalid(layer_name,
                  "the config leaves this layer unquantized (skip_modules or dynamic_config)");
  }
  return *layer;
}

LayerConfig resolve_settings(const LayerConfig& config, bool has_importance) {
  LayerConfig resolved = config;
  resolved.validate();
  resolved.balance = resolve_balance(resolved.balance, has_importance);
  return resolved;
}

}  // namespace hqq

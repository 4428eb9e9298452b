// What every way to quantize a matrix checks and decides first.
#pragma once

#include <span>
#include <string>

#include "hqq/config.hpp"
#include "hqq/tensor.hpp"

namespace hqq {

// A layer's name in messages.
std::string message_name(const std::string& layer_name);

// Throw std::invalid_argument. The data of W is not looked at, and may be null.
void check_shape(const TensorView& W, const std::string& name);
void check_importance(std::span<const float> importance, const TensorView& W,
                      const std::string& name);

// The settings of a layer, or the defaults for an empty name. Throws std::invalid_argument if the
// config leaves the layer unquantized.
LayerConfig layer_settings(const HqqConfig& config, const std::string& layer_name);

// Validated, with balance decided.
LayerConfig resolve_settings(const LayerConfig& config, bool has_importance);

}  // namespace hqq

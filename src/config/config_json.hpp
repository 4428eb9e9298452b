// Settings as parsed JSON. HqqConfig::from_json_text has the forms that are read.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "hqq/config.hpp"

namespace hqq {

// The order of dynamic_config counts: an nlohmann::json, which converts, has its keys sorted
// already.
HqqConfig config_from_json(const nlohmann::ordered_json& json);
// Our own form; config_from_json() gives an equal config.
nlohmann::ordered_json config_to_json(const HqqConfig& config);

// A LayerConfig in our own form (all fields) and back, starting from `base`.
nlohmann::ordered_json layer_config_to_json(const LayerConfig& config);
LayerConfig layer_config_from_json(const nlohmann::ordered_json& json, const LayerConfig& base,
                                   const std::string& where);

}  // namespace hqq

// Shared by config.cpp and config_json.cpp.
#pragma once

#include <string>

#include "hqq/config.hpp"

namespace hqq {

// LayerConfig::validate() with another tag in the message.
void validate_layer_config(const LayerConfig& config, const std::string& where);
// "config, rule 'self_attn.q_proj'", the tag of messages about one rule of dynamic_config.
std::string rule_where(const std::string& key);

}  // namespace hqq

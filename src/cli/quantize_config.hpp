// HqqConfig from a file and the options of `quantize`.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "hqq/config.hpp"

namespace hqq::cli {

struct ConfigSources {
  std::optional<std::string> config_text;          // of --config
  std::optional<std::string> dynamic_config_text;  // of --dynamic-config
  // Keys of our own JSON form that options gave, {"nbits": 4}.
  nlohmann::ordered_json overrides = nlohmann::ordered_json::object();
  std::vector<std::string> skip;
};

// Options win over the files: `overrides` replaces the settings of all layers, and what a rule says
// itself stays; --dynamic-config replaces the file's rules; --skip adds to skip_modules. Throws
// std::invalid_argument.
HqqConfig build_config(const ConfigSources& sources);

}  // namespace hqq::cli

#include "src/cli/quantize_config.hpp"

#include <algorithm>

#include "hqq/error.hpp"
#include "src/base/json.hpp"
#include "src/config/config_json.hpp"

namespace hqq::cli {
namespace {

using Json = nlohmann::ordered_json;

bool is_own_form(const Json& json) {
  if (!json.is_object()) return true;  // from_json explains what is wrong with it
  if (json.contains("quant_config") || json.contains("weight_quant_params")) return false;
  return std::none_of(json.begin(), json.end(), [](const Json& value) {
    return value.is_object() && value.contains("weight_quant_params");
  });
}

// Settings that upstream's and Transformers' dicts always give.
bool is_upstream_setting(const std::string& key) {
  for (const char* name : {"nbits", "group_size", "axis", "quant_zero", "quant_scale"}) {
    if (key == name) return true;
  }
  return false;
}

// A config in someone else's form, in ours. Where it has settings per layer, the options go into
// each of them: it has no settings for the other layers.
Json own_form(HqqConfig config, const Json& overrides) {
  if (!config.dynamic_only) return config_to_json(config);
  for (const auto& [key, value] : overrides.items()) {
    if (is_upstream_setting(key)) {
      throw_invalid("quantize", "the file of --config gives " + key +
                                    " for each layer; an option cannot replace them all, edit "
                                    "the file");
    }
  }
  for (auto& [name, rule] : config.dynamic_config) {
    if (rule) rule = layer_config_from_json(overrides, *rule, "quantize");
  }
  return config_to_json(config);
}

}  // namespace

HqqConfig build_config(const ConfigSources& sources) {
  Json json = Json::object();
  if (sources.config_text) {
    // Errors of the file are reported before those of the options.
    json = parse_config_json(*sources.config_text, "config");
    const HqqConfig file = config_from_json(json);
    if (!is_own_form(json)) json = own_form(file, sources.overrides);
  }
  json.update(sources.overrides);
  if (sources.dynamic_config_text) {
    json["dynamic_config"] = parse_config_json(*sources.dynamic_config_text, "dynamic-config");
  }
  HqqConfig config = config_from_json(json);
  for (const std::string& name : sources.skip) {
    // A rule for exactly this name would win over skip_modules.
    std::erase_if(config.dynamic_config, [&](const auto& rule) { return rule.first == name; });
    config.skip_modules.push_back(name);
  }
  config.validate();
  return config;
}

}  // namespace hqq::cli

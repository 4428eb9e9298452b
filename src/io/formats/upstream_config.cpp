#include "src/io/formats/upstream_config.hpp"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "src/base/json.hpp"
#include "src/base/json_edit.hpp"
#include "src/io/formats/upstream_parts.hpp"

namespace hqq {
namespace {

using Json = nlohmann::ordered_json;

Json parse_config(const std::string& text) {
  return text.empty() ? Json::object() : parse_python_json(text, "config.json");
}

Json quant_config_of(const LayerDescription& layer) {
  const LayerConfig& config = layer.config;
  Json params;
  if (config.nbits == BitWidth::kTernary) {
    params["nbits"] = nbits_of(config.nbits);
  } else {
    params["nbits"] = static_cast<int>(nbits_of(config.nbits));
  }
  params["channel_wise"] = true;
  params["group_size"] = group_layout(config, layer.out_features(), layer.in_features()).group_size;
  params["optimize"] = config.solver != Solver::kMinMax;
  params["round_zero"] = config.effective_round_zero();
  params["axis"] = config.axis;
  params["view_as_float"] = false;
  Json json;
  json["weight_quant_params"] = params;
  json["scale_quant_params"] = nullptr;
  json["zero_quant_params"] = nullptr;
  json["offload_meta"] = false;
  return json;
}

// Transformers compares these names as they are: our patterns mean nothing to it.
bool is_plain_name(const std::string& entry) {
  return !entry.starts_with("re:") && entry.find_first_of("*?[") == std::string::npos;
}

}  // namespace

std::vector<std::string> skip_modules_of(const std::string& config_json) {
  const Json config = parse_config(config_json);
  const auto quantization = config.find("quantization_config");
  if (quantization == config.end() || !quantization->is_object()) return {"lm_head"};
  const auto skip = quantization->find("skip_modules");
  if (skip == quantization->end() || !skip->is_array()) return {"lm_head"};
  std::vector<std::string> names;
  for (const Json& entry : *skip) {
    if (entry.is_string()) names.push_back(entry.get<std::string>());
  }
  return names;
}

std::string upstream_config_json(const std::string& original,
                                 const std::vector<LayerDescription>& layers) {
  // Loading takes every layer's settings from its own tensors; the tags only say which layers are
  // quantized. Of layers that differ within a tag the first speaks for all.
  Json by_tag = Json::object();
  bool all_alike = true;
  const Json first = quant_config_of(layers.front());
  for (const LayerDescription& layer : layers) {
    const Json config = quant_config_of(layer);
    all_alike = all_alike && config == first;
    by_tag.emplace(layer_tag(layer.name), Json(config));
  }
  Json quantization;
  quantization["quant_config"] = all_alike ? first : by_tag;
  quantization["quant_method"] = "hqq";
  quantization["skip_modules"] = Json::array();
  for (const std::string& name : skip_modules_of(original)) {
    if (is_plain_name(name)) quantization["skip_modules"].push_back(name);
  }
  return set_json_member(original, {"quantization_config"}, quantization, "config.json");
}

namespace {

// By tag where all layers of a tag are alike, by name where they are not.
HqqConfig config_by_tags(const std::vector<LayerDescription>& layers,
                         std::vector<std::string> skip_modules) {
  HqqConfig config(layers.front().config);
  config.skip_modules = std::move(skip_modules);
  std::map<std::string, bool> tag_is_uniform;
  std::map<std::string, LayerConfig> of_tag;
  bool all_alike = true;
  for (const LayerDescription& layer : layers) {
    const std::string tag = layer_tag(layer.name);
    const bool alike = of_tag.emplace(tag, layer.config).first->second == layer.config;
    tag_is_uniform.emplace(tag, true).first->second &= alike;
    all_alike = all_alike && layer.config == layers.front().config;
  }
  if (all_alike) return config;
  config.dynamic_only = true;
  for (const LayerDescription& layer : layers) {
    const std::string tag = layer_tag(layer.name);
    // The tag of "model.layers.0" is empty.
    const bool by_tag = tag_is_uniform.at(tag) && !tag.empty();
    const std::string& key = by_tag ? tag : layer.name;
    const bool known = std::any_of(config.dynamic_config.begin(), config.dynamic_config.end(),
                                   [&](const auto& rule) { return rule.first == key; });
    if (!known) config.dynamic_config.emplace_back(key, layer.config);
  }
  return config;
}

}  // namespace

HqqConfig config_of_layers(const std::vector<LayerDescription>& layers,
                           std::vector<std::string> skip_modules) {
  HqqConfig config = config_by_tags(layers, std::move(skip_modules));
  // skip_modules wins over tags, but not over full names.
  for (const LayerDescription& layer : layers) {
    if (config.layer(layer.name) == layer.config) continue;
    config.dynamic_config.emplace_back(layer.name, layer.config);
  }
  return config;
}

}  // namespace hqq

// config.json of converted folders (docs/format.md, "Upstream format").
#pragma once

#include <string>
#include <vector>

#include "src/io/formats/layer_store.hpp"

namespace hqq {

// skip_modules of the quantization_config in a config.json, ours or Transformers'; ["lm_head"] when
// there is none.
std::vector<std::string> skip_modules_of(const std::string& config_json);

// `original` with the quantization_config that Transformers 4 wrote for hqq: one quant_config, or
// one for each tag where layers differ.
std::string upstream_config_json(const std::string& original,
                                 const std::vector<LayerDescription>& layers);

// An HqqConfig that gives every one of `layers` its settings.
HqqConfig config_of_layers(const std::vector<LayerDescription>& layers,
                           std::vector<std::string> skip_modules);

}  // namespace hqq

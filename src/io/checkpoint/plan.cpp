#include "src/io/checkpoint/plan.hpp"

#include <algorithm>
#include <set>

#include "hqq/error.hpp"
#include "hqq/version.hpp"
#include "src/base/json.hpp"
#include "src/base/json_edit.hpp"
#include "src/config/config_json.hpp"
#include "src/io/checkpoint/pipeline.hpp"
#include "src/io/checkpoint/source_check.hpp"
#include "src/model/balance.hpp"
#include "src/model/roles.hpp"

namespace hqq {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kPlanWhere = "quantize";

Roles roles_of(const Checkpoint& source) {
  std::vector<const TensorInfo*> tensors;
  for (std::size_t s = 0; s < source.shard_count(); ++s) {
    for (const TensorInfo& tensor : source.shard(s).tensors()) tensors.push_back(&tensor);
  }
  return Roles(source.config_json(), tensors);
}

PlannedLayer plan_layer(const TensorInfo& tensor, const std::string& name,
                        const LayerConfig& config, const ImportanceFile& importance) {
  PlannedLayer layer;
  layer.description = {name, tensor.name, config, tensor.dtype, tensor.shape};
  layer.source = &tensor;
  layer.has_importance = importance.has(name);
  LayerConfig& resolved = layer.description.config;
  resolved.balance = resolve_balance(resolved.balance, layer.has_importance);
  if (layer.has_importance) importance.check(layer.description);
  layer.tensors =
      tensor_specs(resolved, layer.description.out_features(), layer.description.in_features());
  return layer;
}

void add_layer(QuantizePlan& plan, ShardPlan& shard, std::size_t shard_index, PlannedLayer layer) {
  const LayerDescription& description = layer.description;
  for (const TensorSpec& spec : layer.tensors) {
    if (!spec.present) continue;
    std::vector<std::int64_t> shape = spec.shape;
    if (description.is_fused()) shape.insert(shape.begin(), description.matrices());
    shard.tensors.push_back({description.name + "." + spec.name, spec.dtype, shape, 0,
                             spec.nbytes() * static_cast<std::uint64_t>(description.matrices())});
  }
  const std::uint64_t size = layer.matrix_bytes_before();
  for (std::int64_t expert = 0; expert < description.matrices(); ++expert) {
    shard.steps.push_back({shard_index, plan.layers.size(), expert, layer.source,
                           size * static_cast<std::uint64_t>(expert), size});
  }
  plan.layers.push_back(std::move(layer));
}

ModelNames names_of(const Checkpoint& source) {
  ModelNames names;
  for (std::size_t s = 0; s < source.shard_count(); ++s) {
    for (const TensorInfo& tensor : source.shard(s).tensors()) {
      auto& kind = tensor.shape.size() >= 2 ? names.layers : names.others;
      kind.push_back(layer_name(tensor.name));
    }
  }
  return names;
}

std::string sentence_of(const std::vector<std::string>& warnings) {
  std::string text;
  for (const std::string& warning : warnings) text += "; " + warning;
  return text;
}

// Names across all shards: "X.scale" might have been there before.
void check_unique(const std::vector<ShardPlan>& shards) {
  std::set<std::string> names;
  for (const ShardPlan& shard : shards) {
    for (const TensorInfo& tensor : shard.tensors) {
      if (names.insert(tensor.name).second) continue;
      throw_invalid(kPlanWhere, "the result would hold two tensors named " +
                                    quote_text(tensor.name) + "; the source already has one");
    }
  }
}

// " (of its 6 matrices 2 are embeddings, 4 weights of Conv1D, which quantize_model_ and
// from_pretrained quantize)"
std::string what_matrices_are(const std::vector<std::string>& names, const Roles& roles) {
  constexpr std::pair<Role, std::string_view> kWords[] = {
      {Role::kEmbedding, "embeddings"},
      {Role::kRouter, "routers"},
      {Role::kConv1d, "weights of Conv1D, which quantize_model_ and from_pretrained quantize"},
      {Role::kConv2d, "1x1 convolutions, which quantize_model_ quantizes"},
      {Role::kLinear, "linear layers that the config skips"},
      {Role::kHead, "heads that the config skips"},
      {Role::kExperts, "experts that the config skips"},
      {Role::kNone, "no weights of layers"},
  };
  std::string text;
  for (const auto& [role, words] : kWords) {
    const auto count =
        std::count_if(names.begin(), names.end(),
                      [&, role = role](const std::string& n) { return roles.role(n) == role; });
    if (count == 0) continue;
    text += text.empty() ? "" : ", ";
    text += std::to_string(count) + (text.empty() ? " are " : " ") + std::string(words);
  }
  if (text.empty()) return "";
  return " (of its " + std::to_string(names.size()) + " matrices " + text + ")";
}

}  // namespace

void ShardPlan::copy(const TensorInfo& tensor, std::size_t shard) {
  tensors.push_back(tensor);
  for (std::uint64_t offset = 0; offset < tensor.nbytes(); offset += kCopyChunk) {
    steps.push_back({shard, PlannedStep::kCopy, 0, &tensor, offset,
                     std::min(kCopyChunk, tensor.nbytes() - offset)});
  }
}

void ShardPlan::end_steps(std::size_t shard) {
  // A shard without data still needs a step in which its file is written.
  if (steps.empty()) steps.push_back({shard, PlannedStep::kCopy});
  steps.back().last_of_shard = true;
}

std::uint64_t ShardPlan::data_bytes() const {
  std::uint64_t total = 0;
  for (const TensorInfo& tensor : tensors) total += tensor.nbytes();
  return total;
}

std::uint64_t PlannedLayer::matrix_bytes_before() const {
  return source->nbytes() / static_cast<std::uint64_t>(description.matrices());
}

QuantizePlan plan_quantization(const Checkpoint& source, const HqqConfig& config,
                               const ImportanceFile& importance) {
  config.validate();
  check_dense_source(source);
  const Roles roles = roles_of(source);
  const ModelNames names = names_of(source);
  importance.check_names(names);
  QuantizePlan plan;
  plan.warnings = describe(unmatched_names(config, names));
  for (std::size_t s = 0; s < source.shard_count(); ++s) {
    ShardPlan shard;
    shard.name = output_shard_name(source, s);
    const std::size_t first_layer = plan.layers.size();
    for (const TensorInfo& tensor : source.shard(s).tensors()) {
      const Role role = roles.role(tensor.name);
      const std::string layer = layer_name(tensor.name);
      const auto layer_config =
          is_stored_matrix(role) ? settings_of(layer, role, config) : std::nullopt;
      if (layer_config) {
        add_layer(plan, shard, s, plan_layer(tensor, layer, *layer_config, importance));
        continue;
      }
      shard.copy(tensor, s);
      if (tensor.shape.size() >= 2) plan.copied.push_back(tensor.name);
    }
    shard.metadata = source.shard(s).metadata();
    shard.metadata.emplace("format", "pt");
    std::vector<LayerDescription> descriptions;
    for (std::size_t i = first_layer; i < plan.layers.size(); ++i) {
      descriptions.push_back(plan.layers[i].description);
    }
    if (!descriptions.empty()) shard.metadata[kLayersMetadataKey] = describe_layers(descriptions);
    shard.end_steps(s);
    plan.shards.push_back(std::move(shard));
  }
  if (plan.layers.empty()) {
    throw_invalid(kPlanWhere, quote_text(source.path().string()) +
                                  " holds no linear layer that the config quantizes" +
                                  what_matrices_are(plan.copied, roles) +
                                  sentence_of(plan.warnings));
  }
  check_unique(plan.shards);
  return plan;
}

std::uint64_t total_data_bytes(const std::vector<ShardPlan>& shards) {
  std::uint64_t total = 0;
  for (const ShardPlan& shard : shards) total += shard.data_bytes();
  return total;
}

std::uint64_t QuantizePlan::data_bytes() const { return total_data_bytes(shards); }

QuantizeReport QuantizePlan::report() const {
  QuantizeReport report;
  std::uint64_t quantized_bytes = 0;
  for (const PlannedLayer& layer : layers) {
    const LayerDescription& description = layer.description;
    LayerReport one;
    one.name = description.name;
    one.tag = layer_tag(description.name);
    one.config = description.config;
    one.shape = description.shape;
    one.bytes_before = layer.source->nbytes();
    one.bytes_after =
        layer.matrix_bytes_after() * static_cast<std::uint64_t>(description.matrices());
    report.weights += static_cast<std::uint64_t>(description.numel());
    quantized_bytes += one.bytes_after;
    report.bytes_before += one.bytes_before;
    report.layers.push_back(std::move(one));
  }
  for (const ShardPlan& shard : shards) {
    for (const PlannedStep& step : shard.steps) {
      if (step.layer == PlannedStep::kCopy) report.bytes_before += step.size;
    }
  }
  report.copied = copied;
  report.warnings = warnings;
  report.bytes_after = data_bytes();
  report.bits_per_weight =
      8.0 * static_cast<double>(quantized_bytes) / static_cast<double>(report.weights);
  return report;
}

std::string make_index(const std::vector<ShardPlan>& shards, const std::string& original) {
  std::uint64_t total = 0;
  std::map<std::string, std::string> weight_map;
  for (const ShardPlan& shard : shards) {
    total += shard.data_bytes();
    for (const TensorInfo& tensor : shard.tensors) weight_map[tensor.name] = shard.name;
  }
  constexpr const char* kIndex = "model.safetensors.index.json";
  return set_json_member(set_json_member(original, {"metadata", "total_size"}, total, kIndex),
                         {"weight_map"}, weight_map, kIndex);
}

std::string QuantizePlan::index_json(const std::string& original) const {
  return make_index(shards, original);
}

HqqConfig QuantizePlan::resolved_config(const HqqConfig& config) const {
  // What balance "auto" became for most layers; the others get rules of their own.
  const auto balanced = std::count_if(layers.begin(), layers.end(), [](const PlannedLayer& layer) {
    return layer.description.config.balance == Balance::kSinkhorn;
  });
  const Balance common = 2 * balanced >= static_cast<std::ptrdiff_t>(layers.size())
                             ? Balance::kSinkhorn
                             : Balance::kNone;
  const auto resolve = [&](LayerConfig& layer) {
    if (layer.balance == Balance::kAuto) layer.balance = common;
  };
  HqqConfig resolved = config;
  resolve(resolved.defaults);
  for (auto& [key, rule] : resolved.dynamic_config) {
    if (rule) resolve(*rule);
  }
  for (const PlannedLayer& layer : layers) {
    const LayerDescription& description = layer.description;
    if (resolved.layer(description.name) == description.config) continue;
    const auto same_name = [&](const auto& rule) { return rule.first == description.name; };
    std::erase_if(resolved.dynamic_config, same_name);
    resolved.dynamic_config.emplace_back(description.name, description.config);
  }
  return resolved;
}

std::string QuantizePlan::config_json(const std::string& original, const HqqConfig& config) const {
  Json quantization = {{kQuantizerKey, kQuantizerName}, {"format_version", kFormatVersion}};
  const Json settings = config_to_json(resolved_config(config));
  for (const auto& [key, value] : settings.items()) quantization[key] = value;
  quantization["not_quantized"] = Json::array();
  for (const std::string& tensor : copied) {
    quantization["not_quantized"].push_back(layer_name(tensor));
  }
  return set_json_member(original, {"quantization_config"}, quantization, "config.json");
}

std::string output_shard_name(const Checkpoint& source, std::size_t index) {
  if (!source.is_sharded()) return "model.safetensors";
  return source.shard_names()[index];
}

}  // namespace hqq

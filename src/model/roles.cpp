#include "src/model/roles.hpp"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "hqq/error.hpp"
#include "src/base/json.hpp"
#include "src/model/role_names.hpp"

namespace hqq {
namespace {

constexpr std::string_view kWeightSuffix = ".weight";
constexpr std::string_view kHeadName = "lm_head";

constexpr std::array<std::pair<Role, std::string_view>, 8> kRoleTexts = {{
    {Role::kNone, "none"},
    {Role::kLinear, "linear"},
    {Role::kHead, "head"},
    {Role::kEmbedding, "embedding"},
    {Role::kRouter, "router"},
    {Role::kExperts, "experts"},
    {Role::kConv1d, "conv1d"},
    {Role::kConv2d, "conv2d"},
}};

constexpr std::string_view kExpertsComponent = "experts.";

// Where the component "experts" begins in a name; npos if there is none with something below it.
std::size_t experts_at(const std::string& name) {
  std::size_t at = name.find(kExpertsComponent);
  while (at != std::string::npos && at > 0 && name[at - 1] != '.') {
    at = name.find(kExpertsComponent, at + 1);
  }
  return at;
}

void collect_model_types(const nlohmann::ordered_json& json, std::set<std::string>& types) {
  if (json.is_object()) {
    const auto type = json.find("model_type");
    if (type != json.end() && type->is_string()) types.insert(type->get<std::string>());
  }
  if (!json.is_structured()) return;
  for (const auto& part : json) collect_model_types(part, types);
}

}  // namespace

std::string to_string(Role role) {
  for (const auto& [value, text] : kRoleTexts) {
    if (value == role) return std::string(text);
  }
  throw_invalid("roles", "there is no role number " + std::to_string(static_cast<int>(role)));
}

Role role_from_string(const std::string& text) {
  std::string known;
  for (const auto& [value, name] : kRoleTexts) {
    if (name == text) return value;
    known += (known.empty() ? "" : ", ") + std::string(name);
  }
  throw_invalid("roles", "role " + quote_text(text) + " must be one of " + known);
}

bool is_stored_matrix(Role role) {
  return role == Role::kLinear || role == Role::kHead || role == Role::kEmbedding ||
         role == Role::kExperts;
}

std::string layer_name(const std::string& tensor) {
  if (!tensor.ends_with(kWeightSuffix)) return tensor;
  return tensor.substr(0, tensor.size() - kWeightSuffix.size());
}

std::optional<LayerConfig> settings_of(const std::string& layer, Role role,
                                       const HqqConfig& config) {
  if (role == Role::kRouter) return std::nullopt;
  const std::vector<std::string>& skipped = config.skip_modules;
  const bool heads_stay = std::find(skipped.begin(), skipped.end(), kHeadName) != skipped.end();
  if (role != Role::kHead || !heads_stay) {
    return config.layer(layer, /*must_be_named=*/role == Role::kEmbedding);
  }
  HqqConfig rules = config;
  rules.skip_modules.push_back(layer);
  return rules.layer(layer);
}

Roles::Roles(const std::string& config_json, const std::vector<const TensorInfo*>& tensors) {
  if (!config_json.empty()) {
    collect_model_types(parse_python_json(config_json, "config.json"), model_types_);
  }
  for (const TensorInfo* tensor : tensors) {
    const Entry& entry = tensors_[tensor->name] = {tensor->dtype, tensor->shape};
    count_experts(tensor->name, entry);
  }
  for (const auto& [name, entry] : tensors_) {
    if (entry.shape.size() != 2 || !name.ends_with(kWeightSuffix)) continue;
    const std::string layer = layer_name(name);
    if (is_table(layer)) tables_.insert(entry.shape);
    const std::optional<bool> transposed = proven_transposed(layer, entry);
    if (!transposed) continue;
    Proof& proof = proofs_[parent_of(layer)];
    (*transposed ? proof.transposed : proof.linear) = true;
  }
}

Role Roles::role(const std::string& tensor) const {
  const Entry* entry = find(tensor);
  if (entry == nullptr || !is_weight_dtype(entry->dtype)) return Role::kNone;
  const std::vector<std::int64_t>& shape = entry->shape;
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return Role::kNone;
  const std::string layer = layer_name(tensor);
  if (is_below_adapter(layer)) return Role::kNone;
  // A router's weight may be a parameter of any name.
  if (shape.size() == 2 && is_router(layer, *entry)) return Role::kRouter;
  if (is_dense_expert(layer)) return Role::kNone;
  if (shape.size() == 3) return is_experts_name(layer) ? Role::kExperts : Role::kNone;
  if (!tensor.ends_with(kWeightSuffix)) return Role::kNone;
  if (shape.size() == 2) return matrix_role(layer, *entry);
  const bool is_pointwise = shape.size() == 4 && shape[2] == 1 && shape[3] == 1;
  return is_pointwise ? Role::kConv2d : Role::kNone;
}

Role Roles::matrix_role(const std::string& layer, const Entry& weight) const {
  if (is_used_elsewhere(layer) || is_norm_name(layer)) return Role::kNone;
  if (is_transposed(layer, weight)) return Role::kConv1d;
  if (is_head_name(layer)) return Role::kHead;
  if (may_be_head_name(layer) && tables_.contains(weight.shape)) return Role::kHead;
  return is_table(layer) ? Role::kEmbedding : Role::kLinear;
}

// A lookup adds no bias.
bool Roles::is_table(const std::string& layer) const {
  return is_embedding_name(layer) && find(layer + ".bias") == nullptr;
}

const Roles::Entry* Roles::find(const std::string& tensor) const {
  const auto found = tensors_.find(tensor);
  return found == tensors_.end() ? nullptr : &found->second;
}

bool Roles::has_model_type(const std::set<std::string_view>& types) const {
  return std::any_of(types.begin(), types.end(), [&](std::string_view type) {
    return model_types_.contains(std::string(type));
  });
}

// "X.experts.7.up_proj.weight" means 8 experts or more, a tensor [8, out, in] in X.experts 8.
void Roles::count_experts(const std::string& tensor, const Entry& entry) {
  const std::size_t at = experts_at(tensor);
  if (at == std::string::npos) return;
  const std::string block = at == 0 ? "" : tensor.substr(0, at - 1);
  std::string next = tensor.substr(at + kExpertsComponent.size());
  next = next.substr(0, next.find('.'));
  if (is_number(next) && next.size() < 7) {
    // The largest number counts.
    std::set<std::int64_t>& counts = experts_[block];
    const std::int64_t count = std::stoll(next) + 1;
    if (counts.empty() || *counts.rbegin() < count) counts = {count};
  } else if (entry.shape.size() == 3) {
    experts_[block].insert(entry.shape[0]);
  }
}

// Whether a layer is stored [in, out], where the length of its bias tells.
std::optional<bool> Roles::proven_transposed(const std::string& layer, const Entry& weight) const {
  const Entry* bias = find(layer + ".bias");
  if (bias == nullptr || bias->shape.size() != 1 || weight.shape[0] == weight.shape[1]) {
    return std::nullopt;
  }
  if (bias->shape[0] == weight.shape[1]) return true;
  if (bias->shape[0] == weight.shape[0]) return false;
  return std::nullopt;
}

// Groups would run along the wrong dimension. A square weight is what its neighbours are.
bool Roles::is_transposed(const std::string& layer, const Entry& weight) const {
  if (const std::optional<bool> proven = proven_transposed(layer, weight)) return *proven;
  const auto found = proofs_.find(parent_of(layer));
  if (found != proofs_.end() && found->second.transposed != found->second.linear) {
    return found->second.transposed && find(layer + ".bias") != nullptr;
  }
  return has_model_type(conv1d_model_types()) && is_conv1d_name(last_component(layer));
}

bool Roles::is_router(const std::string& layer, const Entry& weight) const {
  if (is_router_name(layer)) return true;
  // One row for each expert of the block that it is in.
  const auto block = experts_.find(parent_of(layer));
  return block != experts_.end() && block->second.contains(weight.shape[0]);
}

// Alone or merged on load.
bool Roles::is_dense_expert(const std::string& layer) const {
  return experts_at(layer) != std::string::npos && has_model_type(dense_experts_model_types());
}

// Weights of modules that multiply in a way of their own, which their other tensors give away.
bool Roles::is_used_elsewhere(const std::string& layer) const {
  const std::string parent = parent_of(layer);
  const std::string prefix = parent.empty() ? "" : parent + ".";
  const std::string last = last_component(layer);
  const auto has = [&](const char* name) { return find(prefix + name) != nullptr; };
  // nn.MultiheadAttention.
  if (last == "out_proj") {
    return has("in_proj_weight") || has("in_proj_bias") || has("q_proj_weight");
  }
  return is_own_product_name(last) ||
         find(layer + ".weight_integer") != nullptr;  // I-BERT rounds its weights itself
}

}  // namespace hqq

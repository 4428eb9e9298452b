// What a tensor of a model is: the one rule for the command, for torch models and for loaders.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "hqq/config.hpp"
#include "hqq/safetensors.hpp"

namespace hqq {

enum class Role {
  kNone,       // a bias, a norm, a buffer, a weight that its module multiplies with itself, ...
  kLinear,     // [out, in] of y = x W^T
  kHead,       // a linear weight that makes logits over the vocabulary
  kEmbedding,  // a table of vectors
  kRouter,     // chooses the experts of a token
  kExperts,    // [experts, out, in]
  kConv1d,     // [in, out]: Transformers' Conv1D
  kConv2d,     // [out, in, 1, 1]
};

// "none", "linear", "head", "embedding", "router", "experts", "conv1d" and "conv2d".
std::string to_string(Role role);
// Throws std::invalid_argument for any other text.
Role role_from_string(const std::string& text);

// Whether tensors of this role are stored as format 1 quantizes them: [out, in] or [experts, out,
// in].
bool is_stored_matrix(Role role);

// "model.layers.0.mlp.down_proj" for "...down_proj.weight"; other names as they are.
std::string layer_name(const std::string& tensor);

// The settings of a layer, or nullopt if it stays dense. A router does in any case, an embedding
// unless a rule names it; a head is skipped where skip_modules has "lm_head", whatever its own name
// is.
std::optional<LayerConfig> settings_of(const std::string& layer, Role role,
                                       const HqqConfig& config);

// The roles of the tensors of one model. Looks at names, shapes and types, at tensors beside each
// other, and at the model_types in config.json. Names may be those of files or of a live model.
class Roles {
 public:
  // `config_json` is the text of config.json, maybe empty. Throws FormatError if it is no JSON.
  Roles(const std::string& config_json, const std::vector<const TensorInfo*>& tensors);

  // kNone for a name that the model does not have.
  Role role(const std::string& tensor) const;

 private:
  struct Entry {
    DType dtype;
    std::vector<std::int64_t> shape;
  };
  // What biases prove of the layers below a module: which are stored [in, out] and which [out, in].
  struct Proof {
    bool transposed = false;
    bool linear = false;
  };

  const Entry* find(const std::string& tensor) const;
  bool has_model_type(const std::set<std::string_view>& types) const;
  void count_experts(const std::string& tensor, const Entry& entry);
  std::optional<bool> proven_transposed(const std::string& layer, const Entry& weight) const;
  bool is_transposed(const std::string& layer, const Entry& weight) const;
  bool is_router(const std::string& layer, const Entry& weight) const;
  bool is_dense_expert(const std::string& layer) const;
  bool is_table(const std::string& layer) const;
  bool is_used_elsewhere(const std::string& layer) const;
  Role matrix_role(const std::string& layer, const Entry& weight) const;

  std::unordered_map<std::string, Entry> tensors_;
  std::set<std::string> model_types_;
  std::map<std::string, std::set<std::int64_t>> experts_;  // block -> how many experts it may have
  std::map<std::string, Proof> proofs_;                    // module -> of the layers in it
  std::set<std::vector<std::int64_t>> tables_;             // shapes of embeddings
};

}  // namespace hqq

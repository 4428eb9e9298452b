#include "src/model/role_names.hpp"

#include <algorithm>
#include <cctype>
#include <vector>

namespace hqq {
namespace {

using Names = std::set<std::string_view>;

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(separator, begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

// The words of "embed_tokens" or "HashBucketCodepointEmbedder_0", in small letters and without
// numbers.
std::vector<std::string> words_of(std::string component) {
  for (char& c : component) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  std::vector<std::string> words = split(component, '_');
  std::erase_if(words, [](const std::string& word) { return word.empty() || is_number(word); });
  return words;
}

bool has(const Names& names, std::string_view name) { return names.contains(name); }

// Patches are no indices: their embedding is a product.
bool is_patch_projection(const std::vector<std::string>& words) {
  return words.size() == 2 && words[0] == "patch";
}

// "embed", "word_embeddings", "rel_pos_emb", "mask_tokens", "embed_audio", "input_embeds_layer".
bool are_embedding_words(std::vector<std::string> words) {
  static const Names kLast = {"embed",      "embeds", "embedder", "embedding",
                              "embeddings", "emb",    "token",    "tokens"};
  static const Names kAfterwards = {"layer", "layers", "table"};
  if (words.front() == "embed") return true;
  if (words.size() > 1 && has(kAfterwards, words.back())) words.pop_back();
  return has(kLast, words.back()) || words.back().ends_with("embedder") ||
         words.back().ends_with("embed") || words.back().ends_with("codebook");
}

}  // namespace

std::string last_component(const std::string& name) { return name.substr(name.rfind('.') + 1); }

std::string parent_of(const std::string& name) {
  const std::size_t dot = name.rfind('.');
  return dot == std::string::npos ? "" : name.substr(0, dot);
}

bool is_number(std::string_view component) {
  return !component.empty() && component.find_first_not_of("0123456789") == std::string_view::npos;
}

bool is_embedding_name(const std::string& layer) {
  static const Names kNames = {"wte", "wpe", "shared", "w" /* CTRL */, "scale", "shift",
                               // Tables of relative positions.
                               "relative_attention_bias", "bias_values", "pe_k",
                               // Learned queries of detectors.
                               "query_feat", "queries_features", "reference_points",
                               "query_768_resolution", "query_1024_resolution"};
  std::string name = layer;
  // Lists of tables: embed_tokens.0.
  while (is_number(last_component(name))) name = parent_of(name);
  const std::string last = last_component(name);
  if (has(kNames, last)) return true;
  if (last == "encoder") return last_component(parent_of(name)).starts_with("audio");  // Inkling
  const std::vector<std::string> words = words_of(last);
  return !words.empty() && !is_patch_projection(words) && are_embedding_words(words);
}

bool is_norm_name(const std::string& layer) {
  std::vector<std::string> words = words_of(last_component(layer));
  if (words.empty()) return false;
  for (std::string& word : words) word.erase(word.find_last_not_of("0123456789") + 1);
  return words.back().ends_with("norm") || (words.front() == "ln" && words.size() <= 2);
}

bool is_adapter_name(const std::string& component) {
  static const Names kKinds = {"lora",      "hada",  "lokr",   "oft",    "boft",
                               "vera",      "pvera", "ia3",    "vblora", "randlora",
                               "fourierft", "shira", "delora", "gralora"};
  const std::size_t end = component.find('_');
  if (end == std::string::npos || end + 1 == component.size()) return false;
  return has(kKinds, std::string_view(component).substr(0, end));
}

bool is_below_adapter(const std::string& layer) {
  const std::vector<std::string> parts = split(layer, '.');
  return std::any_of(parts.begin(), parts.end(), is_adapter_name);
}

bool is_router_name(const std::string& layer) {
  static const Names kBlocks = {"mlp", "feed_forward", "moe", "ffn", "mixer"};
  static const Names kNames = {"shared_expert_gate", "shared_experts_gate"};
  const std::vector<std::string> parts = split(layer, '.');
  if (has(kNames, parts.back())) return true;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (parts[i] == "router") return true;
    if (i == 0 || parts[i] != "gate") continue;
    const std::string& block = parts[i - 1];
    if (has(kBlocks, block) || block.ends_with("_moe") || block.starts_with("moe_")) return true;
  }
  return false;
}

bool is_experts_name(const std::string& layer) {
  static const Names kNames = {"gate_up_proj", "down_proj", "gate_proj",  "up_proj",
                               "fc1",          "fc2",       "w13_weight", "w2_weight"};
  const std::string last = last_component(layer);
  const std::string parent = last_component(parent_of(layer));
  if (parent == "experts") return has(kNames, last);
  // GraniteMoE's, without a module for the experts.
  return parent == "block_sparse_moe" && (last == "input_linear" || last == "output_linear");
}

bool is_head_name(const std::string& layer) {
  static const Names kNames = {"lm_head", "embed_out", "unembed"};
  return has(kNames, last_component(layer));
}

bool may_be_head_name(const std::string& layer) { return layer == "head" || layer == "output"; }

bool is_own_product_name(const std::string& last) {
  return last == "objective" ||  // a loss, of models that tell speakers apart
         last == "wo_a";         // DeepSeek-V4: a product for each group of heads
}

bool is_conv1d_name(const std::string& last) {
  static const Names kNames = {"c_attn", "c_proj", "c_fc", "q_attn"};
  return has(kNames, last);
}

const std::set<std::string_view>& conv1d_model_types() {
  static const Names kTypes = {"gpt2", "openai-gpt",  "imagegpt", "decision_transformer",
                               "clvp", "clvp_decoder"};
  return kTypes;
}

const std::set<std::string_view>& dense_experts_model_types() {
  static const Names kTypes = {"llama4", "llama4_text", "longcat_flash", "step3p5"};
  return kTypes;
}

}  // namespace hqq

// config.json and generation_config.json: what a model looks like.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

using Json = nlohmann::json;
using Tokens = std::vector<std::int64_t>;

// The whole of a regular file of up to `most` bytes. Throws hqq::FormatError for anything else, and
// std::system_error.
std::string read_text(const std::filesystem::path& file, std::uintmax_t most);
// Calls use(contents without null values); what is wrong with them becomes an hqq::FormatError.
void read_json(const std::filesystem::path& file, std::uintmax_t most,
               const std::function<void(const Json&)>& use);
// A value as it is in the file, cut to 100 characters.
std::string shown(const Json& value);
// Throws std::invalid_argument unless json[key] (or `fallback`, without one) is an integer from
// `least` to `most`.
std::int64_t integer(const Json& json, const std::string& key, std::int64_t least = 1,
                     std::int64_t most = 1 << 24, const Json& fallback = nullptr);
// Throws std::invalid_argument unless the value of `key` (or `fallback`, without one) is known.
void expect(const Json& json, const char* key, const Json& fallback, const std::set<Json>& known);

// A Llama or Qwen3 model, with the names of config.json.
struct Config {
  std::int64_t hidden_size, intermediate_size, num_hidden_layers, num_attention_heads;
  std::int64_t num_key_value_heads, head_dim, vocab_size, max_position_embeddings;
  float rms_norm_eps;
  bool tie_word_embeddings;
  bool has_head_norms;             // Qwen3: RMSNorm of every head of q and k
  std::vector<float> frequencies;  // radians a position, for each of the head_dim / 2 planes
  std::set<std::int64_t> eos_token_ids;
  static Config load(const std::filesystem::path& folder);
};

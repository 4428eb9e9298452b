#include "config.hpp"

#include <cmath>
#include <fstream>
#include <hqq/error.hpp>
#include <numbers>
#include <system_error>

namespace {

// Llama 3 stretches slow rotations by `factor`, leaves fast ones, and blends in between.
float stretch(float frequency, const Json& rope) {
  const float low = rope.at("low_freq_factor"), high = rope.at("high_freq_factor");
  const float context = rope.at("original_max_position_embeddings");
  const float turns = context * frequency / (2 * std::numbers::pi_v<float>);
  const float kept = std::clamp((turns - low) / (high - low), 0.0f, 1.0f);
  return frequency * (kept + (1 - kept) / rope.at("factor").get<float>());
}

// Transformers 5 writes rope_parameters, earlier releases rope_theta and rope_scaling.
std::vector<float> rope_frequencies(const Json& json, std::int64_t head_dim) {
  const Json rope = json.value("rope_parameters", json.value("rope_scaling", Json::object()));
  const float theta = rope.value("rope_theta", json.value("rope_theta", 10000.0f));
  const Json type = rope.value("type", Json("default"));
  expect(rope, "rope_type", type, {"default", "llama3"});
  const bool stretched = rope.value("rope_type", type) == "llama3";
  std::vector<float> frequencies;
  for (std::int64_t i = 0; i < head_dim; i += 2) {
    const float frequency = std::pow(theta, -static_cast<float>(i) / static_cast<float>(head_dim));
    frequencies.push_back(stretched ? stretch(frequency, rope) : frequency);
  }
  return frequencies;
}

void add_eos_tokens(const Json& json, Config& config) {
  const Json ids = json.value("eos_token_id", Json::array());
  for (const Json& id : ids.is_array() ? ids : Json::array({ids}))
    config.eos_token_ids.insert(id.get<std::int64_t>());
}

Config parse(const Json& json) {
  expect(json, "model_type", "", {"llama", "qwen3"});
  expect(json, "hidden_act", "silu", {"silu"});
  expect(json, "use_sliding_window", false, {false});
  Config config;
  config.hidden_size = json.at("hidden_size");
  config.intermediate_size = json.at("intermediate_size");
  config.num_hidden_layers = json.at("num_hidden_layers");
  config.num_attention_heads = json.at("num_attention_heads");
  config.num_key_value_heads = json.value("num_key_value_heads", config.num_attention_heads);
  config.vocab_size = json.at("vocab_size");
  const std::int64_t heads = config.num_attention_heads, kv_heads = config.num_key_value_heads;
  config.head_dim = json.value("head_dim", config.hidden_size / std::max<std::int64_t>(heads, 1));
  if (heads < 1 || kv_heads < 1 || heads % kv_heads || config.head_dim < 2 || config.head_dim % 2) {
    throw std::invalid_argument("heads must be a multiple of heads of keys, and head_dim even");
  }
  config.rms_norm_eps = json.at("rms_norm_eps");
  config.tie_word_embeddings = json.value("tie_word_embeddings", false);
  config.has_head_norms = json.at("model_type") == "qwen3";
  config.frequencies = rope_frequencies(json, config.head_dim);
  add_eos_tokens(json, config);
  return config;
}

}  // namespace

std::string read_text(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(stream), {}};
  if (stream) return text;
  throw std::system_error(ENOENT, std::generic_category(), "cannot read " + file.string());
}

void read_json(const std::filesystem::path& file, const std::function<void(const Json&)>& use) {
  const std::string text = read_text(file);
  try {
    use(Json::parse(text, [](int, auto, const Json& value) { return !value.is_null(); }));
  } catch (const std::exception& error) {
    hqq::throw_format(file.filename().string(), error.what());
  }
}

void expect(const Json& json, const char* key, const Json& fallback, const std::set<Json>& known) {
  const Json found = json.value(key, fallback);
  if (known.contains(found)) return;
  throw std::invalid_argument(std::string(key) + " " + found.dump() + " is not known, only " +
                              Json(known).dump());
}

Config Config::load(const std::filesystem::path& folder) {
  Config config;
  read_json(folder / "config.json", [&](const Json& json) { config = parse(json); });
  const std::filesystem::path generation = folder / "generation_config.json";
  if (std::filesystem::exists(generation)) {
    read_json(generation, [&](const Json& json) { add_eos_tokens(json, config); });
  }
  return config;
}

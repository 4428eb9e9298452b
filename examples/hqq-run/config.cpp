#include "config.hpp"

#include <cmath>
#include <fstream>
#include <hqq/error.hpp>
#include <numbers>
#include <system_error>

namespace {

constexpr std::uintmax_t kMaxConfigBytes = 16'000'000;
constexpr int kMaxDepth = 64;

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
    if (!std::isfinite(frequencies.back())) {
      throw std::invalid_argument("rope_theta " + std::to_string(theta) +
                                  " and its scaling give rotations that are no finite numbers");
    }
  }
  return frequencies;
}

void add_eos_tokens(const Json& json, Config& config) {
  const Json ids = json.value("eos_token_id", Json::array());
  for (const Json& id : ids.is_array() ? ids : Json::array({ids}))
    config.eos_token_ids.insert(integer({{"eos_token_id", id}}, "eos_token_id", -1));
}

Config parse(const Json& json) {
  expect(json, "model_type", "", {"llama", "qwen3"});
  expect(json, "hidden_act", "silu", {"silu"});
  expect(json, "use_sliding_window", false, {false});
  Config config;
  constexpr std::int64_t kMost = 1 << 24;
  config.has_head_norms = json.at("model_type") == "qwen3";
  config.hidden_size = integer(json, "hidden_size");
  config.intermediate_size = integer(json, "intermediate_size");
  config.num_hidden_layers = integer(json, "num_hidden_layers");
  config.vocab_size = integer(json, "vocab_size");
  const std::int64_t heads = config.num_attention_heads = integer(json, "num_attention_heads");
  const std::int64_t kv_heads = config.num_key_value_heads =
      integer(json, "num_key_value_heads", 1, kMost, heads);
  config.head_dim = integer(json, "head_dim", 2, kMost, config.hidden_size / heads);
  // What Transformers takes where there is none.
  config.max_position_embeddings =
      integer(json, "max_position_embeddings", 1, kMost, config.has_head_norms ? 32768 : 2048);
  if (heads % kv_heads || config.head_dim % 2) {
    throw std::invalid_argument("num_attention_heads " + std::to_string(heads) +
                                " must be a multiple of num_key_value_heads " +
                                std::to_string(kv_heads) + ", and head_dim " +
                                std::to_string(config.head_dim) + " even");
  }
  config.rms_norm_eps = json.at("rms_norm_eps");
  if (!(config.rms_norm_eps >= 0 && config.rms_norm_eps <= 1)) {
    throw std::invalid_argument("rms_norm_eps is " + shown(json.at("rms_norm_eps")) +
                                "; it must be from 0 to 1");
  }
  config.tie_word_embeddings = json.value("tie_word_embeddings", false);
  config.frequencies = rope_frequencies(json, config.head_dim);
  add_eos_tokens(json, config);
  return config;
}

}  // namespace

std::string read_text(const std::filesystem::path& file, std::uintmax_t most) {
  const std::filesystem::file_status status = std::filesystem::status(file);
  // Opening a pipe waits for ever, and a device has no end.
  if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status)) {
    hqq::throw_format(file.string(), "a regular file is needed, not a folder, pipe or device");
  }
  std::ifstream stream(file, std::ios::binary);
  if (stream && std::filesystem::file_size(file) > most) {
    hqq::throw_format(file.string(), std::to_string(std::filesystem::file_size(file)) +
                                         " bytes are more than the " + std::to_string(most) +
                                         " allowed");
  }
  std::string text{std::istreambuf_iterator<char>(stream), {}};
  if (stream) return text;
  throw std::system_error(ENOENT, std::generic_category(), "cannot read " + file.string());
}

void read_json(const std::filesystem::path& file, std::uintmax_t most,
               const std::function<void(const Json&)>& use) {
  const std::string text = read_text(file, most);
  try {
    use(Json::parse(text, [](int depth, auto, const Json& value) {
      if (depth > kMaxDepth) throw std::invalid_argument("JSON is nested deeper than 64 levels");
      return !value.is_null();
    }));
  } catch (const std::exception& error) {
    hqq::throw_format(file.filename().string(), error.what());
  }
}

void expect(const Json& json, const char* key, const Json& fallback, const std::set<Json>& known) {
  const Json found = json.value(key, fallback);
  if (known.contains(found)) return;
  throw std::invalid_argument(std::string(key) + " " + shown(found) + " is not known, only " +
                              Json(known).dump());
}

std::string shown(const Json& value) {
  const std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true);
  return text.size() <= 100 ? text : text.substr(0, 100) + "...";
}

std::int64_t integer(const Json& json, const std::string& key, std::int64_t least,
                     std::int64_t most, const Json& fallback) {
  const Json value = json.value(key, fallback);
  const double number = value.is_number() ? value.get<double>() : std::nan("");
  if (value.is_number_integer() && number >= least && number <= most) return value;
  throw std::invalid_argument(
      key.substr(0, 100) + " is " + (value.is_null() ? "missing" : shown(value)) +
      "; it must be an integer from " + std::to_string(least) + " to " + std::to_string(most));
}

Config Config::load(const std::filesystem::path& folder) {
  Config config;
  read_json(folder / "config.json", kMaxConfigBytes,
            [&](const Json& json) { config = parse(json); });
  const std::filesystem::path generation = folder / "generation_config.json";
  if (std::filesystem::exists(generation)) {
    read_json(generation, kMaxConfigBytes, [&](const Json& json) { add_eos_tokens(json, config); });
  }
  return config;
}

// Small models made for a test.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "hqq/safetensors.hpp"
#include "hqq/tensor.hpp"
#include "tests/cpp/support/io_test_util.hpp"

namespace hqq::testing {

using NamedTensors = std::vector<std::pair<std::string, Tensor>>;

// Values around 0 of any weight dtype: bfloat16 and float16 get the upper half of a float, which is
// a valid finite number in both.
inline Tensor random_tensor(DType dtype, std::vector<std::int64_t> shape, unsigned seed) {
  Tensor tensor = Tensor::allocate(dtype, std::move(shape));
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, 0.05f);
  const std::int64_t count = tensor.numel();
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = normal(random);
    if (dtype == DType::kF64) {
      tensor.data<double>()[i] = value;
    } else if (dtype == DType::kF32) {
      tensor.data<float>()[i] = value;
    } else {
      std::uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      tensor.data<std::uint16_t>()[i] = static_cast<std::uint16_t>(bits >> 16);
    }
  }
  return tensor;
}

inline void save_model_file(const std::filesystem::path& path, const NamedTensors& tensors) {
  std::vector<std::pair<std::string, const Tensor*>> pointers;
  for (const auto& [name, tensor] : tensors) pointers.emplace_back(name, &tensor);
  save_safetensors(path, pointers, {{"format", "pt"}});
}

// A folder with one or more shards, config.json and a tokenizer.
inline void save_model(const std::filesystem::path& folder, const std::vector<NamedTensors>& shards,
                       const std::string& config = R"({"model_type": "llama", "z": 1, "a": 2})") {
  std::filesystem::create_directories(folder);
  write_bytes(folder / "config.json", config);
  write_bytes(folder / "tokenizer.json", "{\"tokens\": []}");
  if (shards.size() == 1) {
    save_model_file(folder / "model.safetensors", shards[0]);
    return;
  }
  nlohmann::ordered_json index;
  index["metadata"] = {{"total_size", 0}, {"note", "kept"}};
  for (std::size_t i = 0; i < shards.size(); ++i) {
    const std::string name = "model-0000" + std::to_string(i + 1) + "-of-0000" +
                             std::to_string(shards.size()) + ".safetensors";
    save_model_file(folder / name, shards[i]);
    for (const auto& [tensor, value] : shards[i]) index["weight_map"][tensor] = name;
  }
  write_bytes(folder / "model.safetensors.index.json", index.dump());
}

// One layer of a Llama, [64, 128] and the like: fast, but with several groups in a row.
inline NamedTensors layer_tensors(int layer, DType dtype = DType::kBF16) {
  const std::string prefix = "model.layers." + std::to_string(layer) + ".";
  const auto seed = static_cast<unsigned>(layer * 10);
  return {{prefix + "self_attn.q_proj.weight", random_tensor(dtype, {64, 128}, seed)},
          {prefix + "self_attn.q_proj.bias", random_tensor(dtype, {64}, seed + 1)},
          {prefix + "mlp.down_proj.weight", random_tensor(dtype, {128, 192}, seed + 2)},
          {prefix + "input_layernorm.weight", random_tensor(dtype, {128}, seed + 3)}};
}

// Embedding, three shards of two layers, head.
inline std::vector<NamedTensors> sharded_model() {
  std::vector<NamedTensors> shards(3);
  shards[0].emplace_back("model.embed_tokens.weight", random_tensor(DType::kBF16, {50, 128}, 900));
  for (int layer = 0; layer < 6; ++layer) {
    NamedTensors tensors = layer_tensors(layer);
    auto& shard = shards[static_cast<std::size_t>(layer / 2)];
    shard.insert(shard.end(), tensors.begin(), tensors.end());
  }
  shards[2].emplace_back("lm_head.weight", random_tensor(DType::kBF16, {100, 128}, 901));
  return shards;
}

// Relative name -> content of every file below a folder.
inline std::map<std::string, std::string> contents_of(const std::filesystem::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    if (entry.is_regular_file()) {
      files[entry.path().lexically_relative(folder).generic_string()] = read_bytes(entry.path());
    }
  }
  return files;
}

// Equality without printing megabytes when it fails.
inline ::testing::AssertionResult same_contents(const std::map<std::string, std::string>& a,
                                                const std::map<std::string, std::string>& b) {
  for (const auto& [name, content] : a) {
    if (!b.contains(name)) return ::testing::AssertionFailure() << name << " is only in the first";
    if (b.at(name) != content) return ::testing::AssertionFailure() << name << " differs";
  }
  for (const auto& [name, content] : b) {
    if (!a.contains(name)) return ::testing::AssertionFailure() << name << " is only in the second";
  }
  return ::testing::AssertionSuccess();
}

inline std::string bytes_of(const Tensor& tensor) {
  return {reinterpret_cast<const char*>(tensor.buffer.data), tensor.buffer.size};
}

}  // namespace hqq::testing

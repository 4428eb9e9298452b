// quantize_checkpoint from end to end: what is in the folder afterwards.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "hqq/checkpoint.hpp"
#include "hqq/error.hpp"
#include "src/config/config_json.hpp"
#include "src/io/formats/layer_store.hpp"
#include "tests/cpp/support/message_of.hpp"
#include "tests/cpp/support/model_test_util.hpp"

namespace hqq {
namespace {

namespace fs = std::filesystem;
using testing::bytes_of;
using testing::contents_of;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::message_of;
using testing::NamedTensors;
using testing::random_tensor;
using testing::read_bytes;
using testing::same_contents;
using testing::save_model;
using testing::save_model_file;
using testing::sharded_model;
using testing::TempFolder;
using testing::write_bytes;

const fs::path kTinyLlama = fs::path(HQQ_SOURCE_DIR) / "examples" / "tiny-llama";

std::string tensor_bytes(const Checkpoint& checkpoint, const std::string& name) {
  const auto [info, shard] = checkpoint.find(name);
  if (info == nullptr) return "absent: " + name;
  return bytes_of(checkpoint.shard(shard).read(*info));
}

void expect_equal(const QuantizedTensor& a, const QuantizedTensor& b, const std::string& name) {
  const auto left = a.tensors(), right = b.tensors();
  ASSERT_EQ(left.size(), right.size()) << name;
  for (std::size_t i = 0; i < left.size(); ++i) {
    EXPECT_EQ(left[i].first, right[i].first) << name;
    EXPECT_EQ(left[i].second->shape, right[i].second->shape) << name;
    EXPECT_EQ(bytes_of(*left[i].second), bytes_of(*right[i].second)) << name << left[i].first;
  }
  EXPECT_EQ(a.config, b.config) << name;
}

TEST(QuantizeCheckpoint, TinyLlama) {
  const TempFolder folder;
  const QuantizeReport report = quantize_checkpoint(kTinyLlama, folder / "q", {});
  EXPECT_THAT(folder.names(), ElementsAre("q"));

  const Checkpoint source(kTinyLlama), result(folder / "q");
  const Quantizer quantizer;
  ASSERT_EQ(report.layers.size(), 21u);
  std::uint64_t weights = 0, layer_bytes = 0;
  for (const LayerReport& layer : report.layers) {
    const auto [info, shard] = source.find(layer.name + ".weight");
    ASSERT_NE(info, nullptr) << layer.name;
    QuantizeStats stats;
    QuantizeOptions options;
    options.stats = &stats;
    const Tensor W = source.shard(shard).read(*info);
    const QuantizedTensor expected = quantizer.quantize(TensorView(W), layer.name, options);
    expect_equal(load_quantized(result, layer.name), expected, layer.name);
    EXPECT_EQ(layer.shape, info->shape);
    EXPECT_EQ(layer.tag, layer_tag(layer.name));
    EXPECT_EQ(layer.config, expected.config);
    EXPECT_EQ(layer.bytes_before, info->nbytes());
    EXPECT_EQ(layer.bytes_after, static_cast<std::uint64_t>(expected.nbytes()));
    EXPECT_NEAR(layer.stats.rms_error, stats.rms_error, 1e-9);
    EXPECT_NEAR(layer.stats.relative_error, stats.relative_error, 1e-6);
    EXPECT_NEAR(layer.stats.mean_abs_error, stats.mean_abs_error, 1e-9);
    EXPECT_EQ(layer.stats.max_abs_error, stats.max_abs_error);
    EXPECT_EQ(result.find(layer.name + ".weight").first, nullptr);
    weights += static_cast<std::uint64_t>(W.numel());
    layer_bytes += layer.bytes_after;
  }
  EXPECT_EQ(report.weights, weights);
  EXPECT_EQ(report.bytes_before, source.total_bytes());
  EXPECT_EQ(report.bytes_after, result.total_bytes());
  EXPECT_DOUBLE_EQ(report.bits_per_weight,
                   8.0 * static_cast<double>(layer_bytes) / static_cast<double>(weights));
  EXPECT_GT(report.seconds, 0);
  EXPECT_THAT(report.copied, ElementsAre("model.embed_tokens.weight"));

  for (const TensorInfo& info : source.shard(0).tensors()) {
    if (info.shape.size() == 1 || info.name == "model.embed_tokens.weight") {
      EXPECT_EQ(tensor_bytes(result, info.name), tensor_bytes(source, info.name)) << info.name;
    }
  }
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}) {
    EXPECT_EQ(read_bytes(folder / "q" / name), read_bytes(kTinyLlama / name)) << name;
  }
  EXPECT_TRUE(verify_checkpoint(folder / "q").problems.empty());
}

TEST(QuantizeCheckpoint, ConfigJson) {
  const TempFolder folder;
  HqqConfig config;
  config.defaults.nbits = BitWidth::k3;
  config.skip_modules = {"lm_head", "*.0.mlp.*"};
  LayerConfig eight_bits;
  eight_bits.nbits = BitWidth::k8;
  config.dynamic_config = {{"*.1.self_attn.*", eight_bits}, {"*.self_attn.*", std::nullopt}};
  save_model(folder / "m", sharded_model(),
             R"({"model_type": "llama", "z": [1, 2.5], "a": {"y": null, "b": "\u00e9"}})");
  quantize_checkpoint(folder / "m", folder / "q", config);
  const auto json = nlohmann::ordered_json::parse(read_bytes(folder / "q/config.json"));
  std::vector<std::string> keys;
  for (const auto& [key, value] : json.items()) keys.push_back(key);
  EXPECT_THAT(keys, ElementsAre("model_type", "z", "a", "quantization_config"));
  EXPECT_EQ(json["z"], (nlohmann::ordered_json{1, 2.5}));
  EXPECT_EQ(json["a"]["b"], "\u00e9");
  EXPECT_TRUE(json["a"]["y"].is_null());

  nlohmann::ordered_json quantization = json["quantization_config"];
  // With a method that Transformers does not know it would load random weights; without one it
  // refuses.
  EXPECT_EQ(quantization["quantizer"], "hqq_cpp");
  EXPECT_FALSE(quantization.contains("quant_method"));
  EXPECT_EQ(quantization["format_version"], 1);
  EXPECT_EQ(
      quantization["not_quantized"],
      (nlohmann::ordered_json{"model.embed_tokens", "model.layers.0.self_attn.q_proj",
                              "model.layers.0.mlp.down_proj", "model.layers.2.self_attn.q_proj",
                              "model.layers.3.self_attn.q_proj", "model.layers.4.self_attn.q_proj",
                              "model.layers.5.self_attn.q_proj", "lm_head"}));
  // The settings as they were used: "auto" is resolved, so that a reader knows who has a col_scale.
  config.defaults.balance = Balance::kSinkhorn;
  config.dynamic_config[0].second->balance = Balance::kSinkhorn;
  EXPECT_EQ(config_from_json(quantization), config);
  quantization["format_version"] = 2;
  EXPECT_THROW(config_from_json(quantization), std::invalid_argument);
  // Per layer, where layers differ.
  const Checkpoint result(folder / "q");
  EXPECT_EQ(load_quantized(result, "model.layers.1.self_attn.q_proj").config.nbits, BitWidth::k8);
  EXPECT_EQ(load_quantized(result, "model.layers.1.mlp.down_proj").config.nbits, BitWidth::k3);
}

TEST(QuantizeCheckpoint, Sharded) {
  const TempFolder folder;
  save_model(folder / "m", sharded_model());
  quantize_checkpoint(folder / "m", folder / "q", {});
  const Checkpoint source(folder / "m"), result(folder / "q");
  EXPECT_TRUE(result.is_sharded());
  EXPECT_EQ(result.shard_names(), source.shard_names());
  const auto index = nlohmann::json::parse(read_bytes(folder / "q/model.safetensors.index.json"));
  EXPECT_EQ(index["metadata"]["total_size"], result.total_bytes());
  EXPECT_EQ(index["metadata"]["note"], "kept");
  EXPECT_EQ(index["weight_map"]["model.layers.3.mlp.down_proj.W_q"],
            "model-00002-of-00003.safetensors");
  EXPECT_FALSE(index["weight_map"].contains("model.layers.3.mlp.down_proj.weight"));

  // In place of X.weight, in the order of the source.
  std::vector<std::string> names;
  for (const TensorInfo& info : result.shard(1).tensors()) names.push_back(info.name);
  ASSERT_EQ(names.size(), 20u);
  names.resize(11);
  const std::string layer = "model.layers.2.";
  EXPECT_THAT(names,
              ElementsAre(layer + "self_attn.q_proj.W_q", layer + "self_attn.q_proj.scale",
                          layer + "self_attn.q_proj.zero", layer + "self_attn.q_proj.col_scale",
                          layer + "self_attn.q_proj.bias", layer + "mlp.down_proj.W_q",
                          layer + "mlp.down_proj.scale", layer + "mlp.down_proj.zero",
                          layer + "mlp.down_proj.col_scale", layer + "input_layernorm.weight",
                          "model.layers.3.self_attn.q_proj.W_q"));
  EXPECT_EQ(result.shard(1).metadata().at("format"), "pt");
  EXPECT_THAT(quantized_layers(result),
              ElementsAre("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj",
                          "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj",
                          "model.layers.2.self_attn.q_proj", "model.layers.2.mlp.down_proj",
                          "model.layers.3.self_attn.q_proj", "model.layers.3.mlp.down_proj",
                          "model.layers.4.self_attn.q_proj", "model.layers.4.mlp.down_proj",
                          "model.layers.5.self_attn.q_proj", "model.layers.5.mlp.down_proj"));
  EXPECT_EQ(tensor_bytes(result, "lm_head.weight"), tensor_bytes(source, "lm_head.weight"));
  EXPECT_EQ(tensor_bytes(result, "model.layers.0.self_attn.q_proj.bias"),
            tensor_bytes(source, "model.layers.0.self_attn.q_proj.bias"));

  // A shard alone can be read.
  const Checkpoint alone(folder / "q/model-00002-of-00003.safetensors");
  expect_equal(load_quantized(alone, "model.layers.3.mlp.down_proj"),
               load_quantized(result, "model.layers.3.mlp.down_proj"), "alone");
}

TEST(QuantizeCheckpoint, ThreadsDoNotChangeAByte) {
  const TempFolder folder;
  save_model(folder / "m", sharded_model());
  QuantizeCheckpointOptions options;
  options.threads = 1;
  quantize_checkpoint(folder / "m", folder / "a", {}, options);
  options.threads = 3;
  options.stats = false;
  quantize_checkpoint(folder / "m", folder / "b", {}, options);
  EXPECT_TRUE(same_contents(contents_of(folder / "a"), contents_of(folder / "b")));
}

TEST(QuantizeCheckpoint, EveryWidthTypeAndAxisFitsItsPlan) {
  const TempFolder folder;
  int number = 0;
  for (const BitWidth nbits : kAllBitWidths) {
    for (const int axis : {0, 1}) {
      const DType dtypes[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kF64};
      HqqConfig config;
      config.defaults.nbits = nbits;
      config.defaults.axis = axis;
      config.defaults.quant_scale = number % 2 == 0;
      config.defaults.quant_zero = number % 3 == 0;
      config.defaults.meta_dtype = dtypes[number % 3];
      if (number % 5 == 0) config.defaults.group_size = std::nullopt;
      const std::string name = std::to_string(number);
      save_model(folder / name, {testing::layer_tensors(0, dtypes[number % 4])});
      const QuantizeReport report =
          quantize_checkpoint(folder / name, folder / (name + "q"), config);
      EXPECT_EQ(report.bytes_after, Checkpoint(folder / (name + "q")).total_bytes());
      EXPECT_TRUE(verify_checkpoint(folder / (name + "q")).problems.empty()) << number;
      ++number;
    }
  }
}

TEST(QuantizeCheckpoint, DryRunSaysWhatTheRunDoes) {
  const TempFolder folder;
  save_model(folder / "m", sharded_model());
  QuantizeCheckpointOptions options;
  options.dry_run = true;
  const QuantizeReport plan = quantize_checkpoint(folder / "m", folder / "q", {}, options);
  EXPECT_THAT(folder.names(), ElementsAre("m"));
  const QuantizeReport report = quantize_checkpoint(folder / "m", folder / "q", {});
  EXPECT_EQ(plan.bytes_before, report.bytes_before);
  EXPECT_EQ(plan.bytes_after, report.bytes_after);
  EXPECT_EQ(plan.weights, report.weights);
  EXPECT_EQ(plan.copied, report.copied);
  EXPECT_EQ(plan.bits_per_weight, report.bits_per_weight);
  ASSERT_EQ(plan.layers.size(), report.layers.size());
  for (std::size_t i = 0; i < plan.layers.size(); ++i) {
    EXPECT_EQ(plan.layers[i].name, report.layers[i].name);
    EXPECT_EQ(plan.layers[i].bytes_after, report.layers[i].bytes_after);
    EXPECT_EQ(plan.layers[i].stats.rms_error, 0);
    EXPECT_GT(report.layers[i].stats.rms_error, 0);
  }
}

TEST(QuantizeCheckpoint, FusedExperts) {
  const TempFolder folder;
  const std::string up = "model.layers.0.mlp.experts.gate_up_proj";
  const std::string down = "model.layers.0.mlp.experts.down_proj";
  const Tensor up_weight = random_tensor(DType::kBF16, {5, 48, 96}, 1);
  const Tensor down_weight = random_tensor(DType::kF32, {3, 64, 40}, 2);
  save_model(folder / "m",
             {{{up, up_weight},
               {up + "_bias", random_tensor(DType::kBF16, {5, 48}, 3)},
               {down + ".weight", down_weight},
               {"model.layers.0.mlp.gate.weight", random_tensor(DType::kBF16, {5, 96}, 4)}}});
  HqqConfig config;
  config.defaults.quant_scale = config.defaults.quant_zero = true;
  const QuantizeReport report = quantize_checkpoint(folder / "m", folder / "q", config);
  ASSERT_EQ(report.layers.size(), 2u);
  EXPECT_EQ(report.layers[0].name, up);
  EXPECT_THAT(report.layers[0].shape, ElementsAre(5, 48, 96));
  EXPECT_GT(report.layers[0].stats.rms_error, 0);
  EXPECT_THAT(report.copied, ElementsAre(up + "_bias", "model.layers.0.mlp.gate.weight"));

  const Checkpoint result(folder / "q");
  EXPECT_THAT(result.find(up + ".W_q").first->shape, ElementsAre(5, 48, 48));
  EXPECT_THAT(result.find(up + ".scale_step").first->shape, ElementsAre(5, 1));
  EXPECT_THAT(result.find(down + ".col_scale").first->shape, ElementsAre(3, 40));
  const Quantizer quantizer(config);
  double squares = 0;
  for (const auto& [name, W] : {std::pair(up, up_weight), std::pair(down, down_weight)}) {
    const std::size_t size = W.nbytes() / static_cast<std::size_t>(W.shape[0]);
    for (std::int64_t expert = 0; expert < W.shape[0]; ++expert) {
      const TensorView view(W.buffer.data + size * static_cast<std::size_t>(expert), W.dtype,
                            W.shape[1], W.shape[2]);
      QuantizeStats stats;
      QuantizeOptions options;
      options.stats = &stats;
      const QuantizedTensor expected = quantizer.quantize(view, name, options);
      expect_equal(load_quantized(result, name, expert), expected, name);
      if (name == up) squares += stats.rms_error * stats.rms_error / 5;
    }
    EXPECT_THAT(message_of<std::invalid_argument>(
                    [&, &name = name, &W = W] { load_quantized(result, name, W.shape[0]); }),
                HasSubstr("there is no expert"));
  }
  EXPECT_NEAR(report.layers[0].stats.rms_error, std::sqrt(squares), 1e-12);
  EXPECT_TRUE(verify_checkpoint(folder / "q").problems.empty());

  // Names come back as they were, with and without ".weight".
  dequantize_checkpoint(folder / "q", folder / "d", DType::kF32);
  const Checkpoint dense(folder / "d");
  EXPECT_THAT(dense.find(up).first->shape, ElementsAre(5, 48, 96));
  EXPECT_THAT(dense.find(down + ".weight").first->shape, ElementsAre(3, 64, 40));
  EXPECT_EQ(tensor_bytes(dense, down + ".weight").substr(2 * 64 * 40 * 4),
            bytes_of(dequantize(load_quantized(result, down, 2))));
}

TEST(QuantizeCheckpoint, OneExpert) {
  const TempFolder folder;
  const std::string name = "model.layers.0.mlp.experts.down_proj";
  save_model(folder / "m", {{{name, random_tensor(DType::kBF16, {1, 16, 64}, 1)}}});
  quantize_checkpoint(folder / "m", folder / "q", {});
  EXPECT_THAT(Checkpoint(folder / "q").find(name + ".W_q").first->shape, ElementsAre(1, 16, 32));
  EXPECT_TRUE(verify_checkpoint(folder / "q").problems.empty());
}

TEST(QuantizeCheckpoint, Importance) {
  const TempFolder folder;
  save_model(folder / "m", sharded_model());
  const std::string name = "model.layers.2.mlp.down_proj";
  Tensor importance = Tensor::allocate(DType::kF32, {192});
  for (int i = 0; i < 192; ++i) importance.data<float>()[i] = static_cast<float>(i % 7);
  save_model_file(folder / "i.safetensors", {{name, importance}});
  QuantizeCheckpointOptions options;
  options.importance = folder / "i.safetensors";
  quantize_checkpoint(folder / "m", folder / "q", {}, options);

  const Checkpoint source(folder / "m"), result(folder / "q");
  const auto [info, shard] = source.find(name + ".weight");
  const Tensor W = source.shard(shard).read(*info);
  QuantizeOptions weighted;
  weighted.importance = {importance.data<float>(), 192};
  const QuantizedTensor expected = Quantizer().quantize(TensorView(W), name, weighted);
  EXPECT_EQ(expected.config.balance, Balance::kNone);
  expect_equal(load_quantized(result, name), expected, name);
  EXPECT_EQ(load_quantized(result, "model.layers.2.self_attn.q_proj").config.balance,
            Balance::kSinkhorn);
  // config.json alone says it too, without the shards.
  const auto json = nlohmann::ordered_json::parse(read_bytes(folder / "q/config.json"));
  const HqqConfig written = config_from_json(json["quantization_config"]);
  for (const std::string& layer : quantized_layers(result)) {
    EXPECT_EQ(written.layer(layer), load_quantized(result, layer).config) << layer;
  }
}

TEST(QuantizeCheckpoint, TiedAndSeparateHeads) {
  const TempFolder folder;
  NamedTensors tensors = testing::layer_tensors(0);
  const Tensor embedding = random_tensor(DType::kBF16, {32, 128}, 9);
  tensors.emplace_back("model.embed_tokens.weight", embedding);
  const std::string config = R"({"tie_word_embeddings": true})";
  save_model(folder / "tied", {tensors}, config);
  tensors.emplace_back("lm_head.weight", embedding);
  save_model(folder / "both", {tensors}, config);
  HqqConfig quantize_head;
  quantize_head.skip_modules = {};
  EXPECT_EQ(quantize_checkpoint(folder / "tied", folder / "a", quantize_head).layers.size(), 2u);
  EXPECT_EQ(quantize_checkpoint(folder / "both", folder / "b", {}).layers.size(), 2u);
  EXPECT_EQ(quantize_checkpoint(folder / "both", folder / "c", quantize_head).layers.size(), 3u);
}

TEST(QuantizeCheckpoint, AShardWithoutData) {
  const TempFolder folder;
  std::vector<NamedTensors> shards = {testing::layer_tensors(0), {}};
  shards[1].emplace_back("empty", Tensor::allocate(DType::kF32, {0, 4}));
  save_model(folder / "m", shards);
  quantize_checkpoint(folder / "m", folder / "q", {});
  EXPECT_EQ(Checkpoint(folder / "q").shard(1).tensors().size(), 1u);
  EXPECT_TRUE(verify_checkpoint(folder / "q").problems.empty());
}

TEST(QuantizeCheckpoint, BadWeightsNameTheirLayerAndLeaveNothing) {
  const TempFolder folder;
  NamedTensors tensors = testing::layer_tensors(0, DType::kF32);
  tensors[2].second.data<float>()[77] = std::numeric_limits<float>::quiet_NaN();
  save_model(folder / "m", {tensors});
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [&] { quantize_checkpoint(folder / "m", folder / "q", {}); }),
              HasSubstr("model.layers.0.mlp.down_proj"));
  EXPECT_THAT(folder.names(), ElementsAre("m"));

  Tensor experts = random_tensor(DType::kF32, {3, 8, 32}, 1);
  experts.data<float>()[2 * 8 * 32 + 5] = std::numeric_limits<float>::infinity();
  save_model(folder / "moe", {{{"mlp.experts.down_proj", experts}}});
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [&] { quantize_checkpoint(folder / "moe", folder / "q", {}); }),
              HasSubstr("mlp.experts.down_proj[2]"));
}

TEST(QuantizeCheckpoint, WrongArguments) {
  const TempFolder folder;
  save_model(folder / "m", {testing::layer_tensors(0)});
  QuantizeCheckpointOptions options;
  options.threads = -1;
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [&] { quantize_checkpoint(folder / "m", folder / "q", {}, options); }),
              HasSubstr("threads is -1"));
  HqqConfig config;
  config.defaults.group_size = 12;
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [&] { quantize_checkpoint(folder / "m", folder / "q", config); }),
              HasSubstr("group_size is 12"));
  EXPECT_THROW(quantize_checkpoint(folder / "absent", folder / "q", {}), std::system_error);
  options = {};
  options.importance = folder / "absent.safetensors";
  EXPECT_THROW(quantize_checkpoint(folder / "m", folder / "q", {}, options), std::system_error);
  quantize_checkpoint(folder / "m", folder / "q", {});
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [&] { quantize_checkpoint(folder / "q", folder / "r", {}); }),
              HasSubstr("already quantized by hqq_cpp"));
  EXPECT_THAT(folder.names(), ElementsAre("m", "q"));
}

}  // namespace
}  // namespace hqq

// convert_checkpoint on folders; what a layer becomes is the matter of upstream_test.cpp.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <random>

#include "hqq/checkpoint.hpp"
#include "hqq/error.hpp"
#include "hqq/quantizer.hpp"
#include "hqq/safetensors.hpp"
#include "src/config/config_json.hpp"
#include "src/io/formats/upstream.hpp"
#include "tests/cpp/support/io_test_util.hpp"
#include "tests/cpp/support/message_of.hpp"

namespace hqq {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::message_of;
using testing::read_bytes;
using testing::TempFolder;
using testing::write_bytes;

using Tensors = std::map<std::string, Tensor>;

Tensors tensors_of(const fs::path& path) {
  const Checkpoint checkpoint(path);
  Tensors tensors;
  for (std::size_t s = 0; s < checkpoint.shard_count(); ++s) {
    for (const TensorInfo& info : checkpoint.shard(s).tensors()) {
      tensors[info.name] = checkpoint.shard(s).read(info);
    }
  }
  return tensors;
}

void save(const fs::path& path, const Tensors& tensors) {
  std::vector<std::pair<std::string, const Tensor*>> list;
  for (const auto& [name, tensor] : tensors) list.emplace_back(name, &tensor);
  save_safetensors(path, list, {{"format", "pt"}});
}

bool same(const Tensor& a, const Tensor& b) {
  return a.dtype == b.dtype && a.shape == b.shape &&
         std::memcmp(a.buffer.data, b.buffer.data, a.nbytes()) == 0;
}

Tensor random_matrix(std::vector<std::int64_t> shape, std::uint32_t seed) {
  std::mt19937 random(seed);
  Tensor tensor = Tensor::allocate(DType::kF32, std::move(shape));
  for (std::int64_t i = 0; i < tensor.numel(); ++i) {
    tensor.data<float>()[i] = static_cast<float>(random() % 2001) / 1000.0f - 1.0f;
  }
  return tensor;
}

template <class Options>
Options force() {
  Options options;
  options.force = true;
  return options;
}

// A dense model of two blocks.
class ConvertTest : public ::testing::Test {
 protected:
  ConvertTest() {
    fs::create_directory(dense);
    Tensors tensors;
    for (const char* block : {"0", "1"}) {
      const std::string prefix = std::string("model.layers.") + block + ".";
      tensors[prefix + "mlp.down_proj.weight"] = random_matrix({32, 128}, 1);
      tensors[prefix + "self_attn.q_proj.weight"] = random_matrix({64, 32}, 2);
      tensors[prefix + "self_attn.q_proj.bias"] = random_matrix({64}, 3);
      tensors[prefix + "norm.weight"] = random_matrix({32}, 4);
    }
    tensors["model.embed_tokens.weight"] = random_matrix({50, 32}, 5);
    save(dense / "model.safetensors", tensors);
    write_bytes(dense / "config.json", R"({"model_type": "llama", "hidden_size": 32})");
    write_bytes(dense / "tokenizer.json", "{}");
  }

  HqqConfig config(BitWidth nbits = BitWidth::k4) const {
    HqqConfig result;
    result.defaults.nbits = nbits;
    result.defaults.group_size = 16;
    result.defaults.solver = Solver::kHqq;
    result.defaults.balance = Balance::kNone;
    return result;
  }

  void quantize(const HqqConfig& config) const { quantize_checkpoint(dense, ours, config); }
  void to_upstream() const { convert_checkpoint(ours, upstream, CheckpointFormat::kUpstream); }
  void to_ours() const { convert_checkpoint(upstream, back, CheckpointFormat::kHqqCpp); }

  const TempFolder folder;
  const fs::path dense = folder / "dense";
  const fs::path ours = folder / "ours";
  const fs::path upstream = folder / "upstream";
  const fs::path back = folder / "back";
};

TEST_F(ConvertTest, EveryTensorComesBack) {
  for (const BitWidth width : kAllBitWidths) {
    quantize_checkpoint(dense, ours, config(width), force<QuantizeCheckpointOptions>());
    convert_checkpoint(ours, upstream, CheckpointFormat::kUpstream, force<CheckpointOptions>());
    convert_checkpoint(upstream, back, CheckpointFormat::kHqqCpp, force<CheckpointOptions>());
    EXPECT_THAT(verify_checkpoint(back).problems, ElementsAre());
    const Tensors before = tensors_of(ours);
    const Tensors after = tensors_of(back);
    ASSERT_EQ(before.size(), after.size());
    for (const auto& [name, tensor] : before) {
      ASSERT_TRUE(after.contains(name)) << name;
      EXPECT_TRUE(same(tensor, after.at(name))) << name;
    }
    EXPECT_EQ(read_bytes(back / "tokenizer.json"), "{}");
  }
}

TEST_F(ConvertTest, UpstreamFolderIsWhatTransformersSaved) {
  quantize(config());
  to_upstream();
  const json written = json::parse(read_bytes(upstream / "config.json"));
  EXPECT_EQ(written["hidden_size"], 32);
  EXPECT_EQ(written["quantization_config"], json::parse(R"({
    "quant_method": "hqq", "skip_modules": ["lm_head"],
    "quant_config": {
      "weight_quant_params": {"nbits": 4, "channel_wise": true, "group_size": 16, "optimize": true,
                              "round_zero": true, "axis": 1, "view_as_float": false},
      "scale_quant_params": null, "zero_quant_params": null, "offload_meta": false}})"));
  // Our own reader of Transformers' form agrees.
  EXPECT_EQ(config_from_json(written["quantization_config"]).defaults.group_size, 16);
  EXPECT_FALSE(fs::exists(upstream / "hqq_cpp.manifest.json"));
  const SafetensorsFile file(upstream / "model.safetensors");
  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{{"format", "pt"}}));
  EXPECT_NE(file.find("model.layers.0.self_attn.q_proj.bias"), nullptr);
  EXPECT_EQ(file.find("model.layers.0.self_attn.q_proj.weight"), nullptr);
  // Readers that view the bytes in place need every tensor aligned.
  for (const TensorInfo& info : file.tensors()) {
    EXPECT_EQ(info.begin % dtype_size(info.dtype), 0u) << info.name;
  }
}

TEST_F(ConvertTest, SettingsPerTag) {
  HqqConfig mixed = config();
  LayerConfig two_bits = mixed.defaults;
  two_bits.nbits = BitWidth::k2;
  mixed.dynamic_config.emplace_back("mlp.down_proj", two_bits);
  mixed.skip_modules = {"lm_head", "re:.*norm", "*.gate"};
  quantize(mixed);
  to_upstream();
  const json written = json::parse(read_bytes(upstream / "config.json"))["quantization_config"];
  EXPECT_EQ(written["quant_config"]["mlp.down_proj"]["weight_quant_params"]["nbits"], 2);
  EXPECT_EQ(written["quant_config"]["self_attn.q_proj"]["weight_quant_params"]["nbits"], 4);
  EXPECT_EQ(written["quant_config"].size(), 2u);
  // Transformers knows no patterns.
  EXPECT_EQ(written["skip_modules"], json::parse(R"(["lm_head"])"));
  to_ours();
  json read = json::parse(read_bytes(back / "config.json"))["quantization_config"];
  EXPECT_EQ(written["quant_method"], "hqq");
  EXPECT_EQ(read["quantizer"], "hqq_cpp");
  EXPECT_EQ(read["dynamic_config"]["mlp.down_proj"]["nbits"], 2);
  EXPECT_EQ(read["dynamic_only"], true);
  EXPECT_THAT(verify_checkpoint(back).problems, ElementsAre());
}

TEST_F(ConvertTest, LayersOfOneTagMayDiffer) {
  HqqConfig mixed = config();
  LayerConfig two_bits = mixed.defaults;
  two_bits.nbits = BitWidth::k2;
  mixed.dynamic_config.emplace_back("model.layers.1.mlp.down_proj", two_bits);
  quantize(mixed);
  to_upstream();
  to_ours();
  const Checkpoint checkpoint(back);
  EXPECT_EQ(load_quantized(checkpoint, "model.layers.0.mlp.down_proj").config.nbits, BitWidth::k4);
  EXPECT_EQ(load_quantized(checkpoint, "model.layers.1.mlp.down_proj").config.nbits, BitWidth::k2);
  const json read = json::parse(read_bytes(back / "config.json"))["quantization_config"];
  EXPECT_EQ(read["dynamic_config"]["model.layers.1.mlp.down_proj"]["nbits"], 2);
  EXPECT_EQ(read["dynamic_config"]["self_attn.q_proj"]["nbits"], 4);
}

TEST_F(ConvertTest, EightBitMetadataKeepsItsValues) {
  HqqConfig small = config();
  small.defaults.quant_scale = true;
  small.defaults.quant_zero = true;
  quantize(small);
  to_upstream();
  to_ours();
  const Checkpoint before(ours);
  const Checkpoint after(back);
  for (const std::string& name : quantized_layers(before)) {
    EXPECT_TRUE(
        same(dequantize(load_quantized(before, name)), dequantize(load_quantized(after, name))))
        << name;
  }
}

// Shards that Transformers cut in the middle of a layer.
TEST_F(ConvertTest, TensorsOfALayerMayLieInDifferentShards) {
  quantize(config(BitWidth::k3));
  to_upstream();
  const Tensors all = tensors_of(upstream);
  const fs::path cut = folder / "cut";
  fs::create_directory(cut);
  Tensors parts[2];
  json index = {{"metadata", {{"total_size", 0}}}, {"weight_map", json::object()}};
  const std::string names[] = {"model-00001-of-00002.safetensors",
                               "model-00002-of-00002.safetensors"};
  int count = 0;
  for (const auto& [name, tensor] : all) {
    const int part = count++ % 2;
    parts[part][name] = tensor;
    index["weight_map"][name] = names[part];
  }
  for (int part : {0, 1}) save(cut / names[part], parts[part]);
  write_bytes(cut / "model.safetensors.index.json", index.dump());
  write_bytes(cut / "config.json", "{}");

  convert_checkpoint(cut, back, CheckpointFormat::kHqqCpp);
  EXPECT_THAT(verify_checkpoint(back).problems, ElementsAre());
  const Checkpoint before(ours);
  const Checkpoint after(back);
  EXPECT_EQ(after.shard_count(), 2u);
  for (const std::string& name : quantized_layers(before)) {
    EXPECT_TRUE(same(load_quantized(before, name).W_q, load_quantized(after, name).W_q)) << name;
  }
}

TEST_F(ConvertTest, FilesOfHqqItself) {
  const fs::path golden = HQQ_SOURCE_DIR "/tests/golden/upstream/layers.safetensors";
  convert_checkpoint(golden, ours, CheckpointFormat::kHqqCpp);
  EXPECT_THAT(verify_checkpoint(ours).problems, ElementsAre());
  convert_checkpoint(ours, upstream, CheckpointFormat::kUpstream);
  const Tensors before = tensors_of(golden);
  const Tensors after = tensors_of(upstream);
  EXPECT_EQ(before.size(), after.size());
  for (const auto& [name, tensor] : before) {
    // view_as_float is not kept: the same codes come back as integers.
    if (name.starts_with("float_view")) continue;
    ASSERT_TRUE(after.contains(name)) << name;
    EXPECT_TRUE(same(tensor, after.at(name))) << name;
  }
}

// ---- refusals: each leaves nothing behind ----

TEST_F(ConvertTest, FoldersOfTheWrongKind) {
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [&] { convert_checkpoint(dense, back, CheckpointFormat::kUpstream); }),
              HasSubstr("holds no layer in format 1 of hqq_cpp; quantize it first"));
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [&] { convert_checkpoint(dense, back, CheckpointFormat::kHqqCpp); }),
              HasSubstr("holds no layer of hqq: no tensor is named <layer>.W_q"));
  quantize(config());
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [&] { convert_checkpoint(ours, back, CheckpointFormat::kHqqCpp); }),
              HasSubstr("is in format 1 of hqq_cpp already"));
  EXPECT_THAT(folder.names(), ElementsAre("dense", "ours"));
}

TEST_F(ConvertTest, WhatUpstreamCannotHold) {
  HqqConfig balanced = config();
  balanced.defaults.balance = Balance::kSinkhorn;
  quantize(balanced);
  EXPECT_THAT(message_of<std::invalid_argument>([&] { to_upstream(); }),
              HasSubstr("layer \"model.layers.0.mlp.down_proj\"] hqq has no place for col_scale; "
                        "quantize with balance none"));
  HqqConfig tails = config();
  tails.defaults.group_size = 48;
  quantize_checkpoint(dense, ours, tails, force<QuantizeCheckpointOptions>());
  EXPECT_THAT(message_of<std::invalid_argument>([&] { to_upstream(); }),
              HasSubstr("hqq has no short last groups; group_size 48 must divide 128"));
  EXPECT_THAT(folder.names(), ElementsAre("dense", "ours"));
}

TEST_F(ConvertTest, FusedExperts) {
  Tensors tensors;
  tensors["model.layers.0.mlp.experts.down_proj"] = random_matrix({2, 32, 64}, 1);
  save(dense / "model.safetensors", tensors);
  quantize(config());
  EXPECT_THAT(message_of<std::invalid_argument>([&] { to_upstream(); }),
              HasSubstr("hqq has no experts that share a tensor (this one is [2, 32, 64])"));
}

TEST_F(ConvertTest, DamagedSource) {
  quantize(config());
  to_upstream();
  Tensors tensors = tensors_of(upstream);
  const std::string layer = "model.layers.1.mlp.down_proj";
  tensors.erase(layer + ".zero");
  save(upstream / "model.safetensors", tensors);
  EXPECT_THAT(message_of<FormatError>([&] { to_ours(); }),
              HasSubstr("[upstream, layer \"" + layer + "\"] tensor zero is missing"));
  EXPECT_THAT(folder.names(), ElementsAre("dense", "ours", "upstream"));
}

// Found only while converting: the destination must not appear all the same.
TEST_F(ConvertTest, DamagedCodes) {
  quantize(config(BitWidth::k5));
  to_upstream();
  Tensors tensors = tensors_of(upstream);
  tensors["model.layers.1.mlp.down_proj.W_q"].data<std::uint8_t>()[7] = 200;
  save(upstream / "model.safetensors", tensors);
  EXPECT_THAT(message_of<FormatError>([&] { to_ours(); }),
              HasSubstr("W_q has the code 200 for the weight [0, 7]; the largest is 31"));
  EXPECT_THAT(folder.names(), ElementsAre("dense", "ours", "upstream"));
}

TEST_F(ConvertTest, StoppedByTheCaller) {
  quantize(config());
  CheckpointOptions options;
  options.progress = [](const Progress&) { return false; };
  EXPECT_THROW(convert_checkpoint(ours, upstream, CheckpointFormat::kUpstream, options),
               Interrupted);
  EXPECT_THAT(folder.names(), ElementsAre("dense", "ours"));
}

TEST_F(ConvertTest, ExistingDestination) {
  quantize(config());
  to_upstream();
  EXPECT_THAT(message_of<std::invalid_argument>([&] { to_upstream(); }), HasSubstr("exists"));
}

}  // namespace
}  // namespace hqq

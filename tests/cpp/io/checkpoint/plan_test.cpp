// What is quantized and what is not, and importance files.
#include "src/io/checkpoint/plan.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "hqq/bitpack.hpp"
#include "hqq/error.hpp"
#include "tests/cpp/support/message_of.hpp"
#include "tests/cpp/support/model_test_util.hpp"

namespace hqq {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::message_of;
using testing::NamedTensors;
using testing::random_tensor;
using testing::save_model;
using testing::save_model_file;
using testing::TempFolder;

QuantizePlan plan_of(const std::filesystem::path& source, const HqqConfig& config = {},
                     const std::filesystem::path& importance = {}) {
  return plan_quantization(Checkpoint(source), config, ImportanceFile(importance));
}

TEST(Plan, SizesOfEveryWidth) {
  const TempFolder folder;
  save_model(folder / "m", {testing::layer_tensors(0)});
  const Checkpoint source(folder / "m");
  for (const BitWidth nbits : kAllBitWidths) {
    HqqConfig config;
    config.defaults.nbits = nbits;
    config.defaults.quant_scale = true;
    const QuantizePlan plan = plan_quantization(source, config, ImportanceFile(""));
    ASSERT_EQ(plan.layers.size(), 2u);
    const TensorSpecs& tensors = plan.layers[0].tensors;
    std::vector<std::string> names;
    for (const TensorSpec& spec : tensors) {
      if (spec.present) names.push_back(spec.name);
    }
    EXPECT_THAT(names,
                ElementsAre("W_q", "scale", "zero", "scale_step", "scale_offset", "col_scale"));
    EXPECT_THAT(tensors[0].shape, ElementsAre(64, packed_row_bytes(nbits, 128)));
    EXPECT_THAT(tensors[1].shape, ElementsAre(64, 2));
    EXPECT_EQ(tensors[1].dtype, DType::kU8);
    EXPECT_EQ(tensors[2].dtype, DType::kF16);
    EXPECT_THAT(tensors[3].shape, ElementsAre(1));
    EXPECT_THAT(tensors[7].shape, ElementsAre(128));
  }
}

TEST(Plan, BalanceAutoDependsOnImportance) {
  const TempFolder folder;
  save_model(folder / "m", {testing::layer_tensors(0)});
  Tensor ones = Tensor::allocate(DType::kF32, {128});
  std::fill_n(ones.data<float>(), 128, 1.0f);
  save_model_file(folder / "i.safetensors", {{"model.layers.0.self_attn.q_proj", ones}});
  const Checkpoint source(folder / "m");
  const QuantizePlan plan = plan_quantization(source, {}, ImportanceFile(folder / "i.safetensors"));
  for (const PlannedLayer& layer : plan.layers) {
    const bool weighted = layer.description.name.ends_with("q_proj");
    EXPECT_EQ(layer.has_importance, weighted);
    EXPECT_EQ(layer.description.config.balance, weighted ? Balance::kNone : Balance::kSinkhorn);
  }
}

TEST(Plan, NothingToQuantize) {
  const TempFolder folder;
  save_model(folder / "m", {{{"model.embed_tokens.weight", random_tensor(DType::kF32, {8, 8}, 1)},
                             {"norm.weight", random_tensor(DType::kF32, {8}, 1)}}});
  EXPECT_THAT(
      message_of<std::invalid_argument>([&] { plan_of(folder / "m"); }),
      AllOf(HasSubstr("[quantize]"), HasSubstr("no linear layer"), HasSubstr("1 matrices")));
}

TEST(Plan, NothingButConv1d) {
  const TempFolder folder;
  save_model(folder / "m", {{{"h.0.attn.c_attn.bias", random_tensor(DType::kF32, {24}, 1)},
                             {"h.0.attn.c_attn.weight", random_tensor(DType::kF32, {8, 24}, 2)},
                             {"wte.weight", random_tensor(DType::kF32, {16, 8}, 3)}}});
  EXPECT_THAT(message_of<std::invalid_argument>([&] { plan_of(folder / "m"); }),
              HasSubstr("(of its 2 matrices 1 are embeddings, 1 weights of Conv1D, which "
                        "quantize_model_ and from_pretrained quantize)"));
}

TEST(Plan, EmbeddingsByName) {
  const TempFolder folder;
  NamedTensors tensors = testing::layer_tensors(0);
  tensors.emplace_back("model.embed_tokens.weight", random_tensor(DType::kBF16, {32, 128}, 3));
  save_model(folder / "m", {tensors});
  EXPECT_THAT(plan_of(folder / "m").copied, ElementsAre("model.embed_tokens.weight"));

  HqqConfig config;
  LayerConfig eight;
  eight.nbits = BitWidth::k8;
  config.dynamic_config = {{"embed_tokens", eight}};
  const QuantizePlan plan = plan_of(folder / "m", config);
  EXPECT_TRUE(plan.copied.empty());
  ASSERT_EQ(plan.layers.size(), 3u);
  const LayerDescription& embedding = plan.layers.back().description;
  EXPECT_EQ(embedding.name, "model.embed_tokens");
  EXPECT_EQ(embedding.config.nbits, BitWidth::k8);
  EXPECT_EQ(plan.resolved_config(config).layer("model.embed_tokens"), embedding.config);
}

TEST(Plan, RolesDecideWhatIsCopied) {
  const TempFolder folder;
  const auto weight = [](std::vector<std::int64_t> shape) {
    return random_tensor(DType::kF32, std::move(shape), 1);
  };
  save_model(folder / "m",
             {{{"decoder.h.0.attn.c_attn.weight", weight({16, 16})},
               {"decoder.h.0.mlp.gate.weight", weight({4, 16})},
               {"decoder.h.0.mlp.experts.gate_up_proj", weight({4, 32, 16})},
               {"decoder.h.0.conv.weight", weight({16, 16, 1, 1})},
               {"decoder.h.0.q_proj.weight", weight({16, 16})},
               {"decoder.wte.weight", weight({32, 16})},
               {"lm_head.weight", weight({32, 16})}}},
             R"({"decoder": {"model_type": "gpt2"}})");
  const QuantizePlan plan = plan_of(folder / "m");
  std::vector<std::string> layers;
  for (const PlannedLayer& layer : plan.layers) layers.push_back(layer.description.name);
  EXPECT_THAT(layers, ElementsAre("decoder.h.0.mlp.experts.gate_up_proj", "decoder.h.0.q_proj"));
  EXPECT_THAT(plan.copied,
              ElementsAre("decoder.h.0.attn.c_attn.weight", "decoder.h.0.mlp.gate.weight",
                          "decoder.h.0.conv.weight", "decoder.wte.weight", "lm_head.weight"));
}

TEST(Plan, QuantizedSources) {
  const TempFolder folder;
  const NamedTensors tensors = testing::layer_tensors(0);
  save_model(folder / "awq", {tensors}, R"({"quantization_config": {"quant_method": "awq"}})");
  EXPECT_THAT(message_of<std::invalid_argument>([&] { plan_of(folder / "awq"); }),
              AllOf(HasSubstr("already quantized"), HasSubstr("\"awq\"")));
  // "quant_method" is what the first folders have.
  for (const std::string key : {"quantizer", "quant_method"}) {
    save_model(folder / key, {tensors},
               R"({"quantization_config": {")" + key + R"(": "hqq_cpp"}})");
    EXPECT_THAT(message_of<std::invalid_argument>([&] { plan_of(folder / key); }),
                HasSubstr("already quantized by hqq_cpp; dequantize it first"));
  }
  save_model(folder / "null", {tensors}, R"({"quantization_config": null})");
  EXPECT_EQ(plan_of(folder / "null").layers.size(), 2u);
}

TEST(Plan, NameClash) {
  const TempFolder folder;
  NamedTensors tensors = testing::layer_tensors(0);
  tensors.emplace_back("model.layers.0.mlp.down_proj.scale", random_tensor(DType::kF32, {3}, 1));
  save_model(folder / "m", {tensors});
  EXPECT_THAT(message_of<std::invalid_argument>([&] { plan_of(folder / "m"); }),
              AllOf(HasSubstr("two tensors named"), HasSubstr("down_proj.scale")));
}

struct ImportanceCase {
  std::string name;
  std::string tensor;
  Tensor values;
  std::string message;
};

Tensor float_tensor(std::vector<float> values) {
  Tensor tensor = Tensor::allocate(DType::kF32, {static_cast<std::int64_t>(values.size())});
  std::copy(values.begin(), values.end(), tensor.data<float>());
  return tensor;
}

std::vector<float> ones_but(std::size_t count, std::size_t at, float value) {
  std::vector<float> values(count, 1.0f);
  values[at] = value;
  return values;
}

TEST(Importance, Refusals) {
  const std::string layer = "model.layers.0.self_attn.q_proj";
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  const std::vector<ImportanceCase> cases = {
      {"unknown", "model.layers.9.self_attn.q_proj", float_tensor(ones_but(128, 0, 1)),
       "no layer \"model.layers.9.self_attn.q_proj\""},
      {"length", layer, float_tensor(ones_but(64, 0, 1)),
       "shape [64]; layer [64, 128] needs [128]"},
      {"dimensions", layer, random_tensor(DType::kF32, {1, 128}, 1), "shape [1, 128]"},
      {"nan", layer, float_tensor(ones_but(128, 5, kNaN)), "nan at position 5"},
      {"infinite", layer, float_tensor(ones_but(128, 127, kInf)), "inf at position 127"},
      {"negative", layer, float_tensor(ones_but(128, 3, -1)), "-1.000000 at position 3"},
      {"zeros", layer, float_tensor(std::vector<float>(128, 0.0f)), "all zeros"},
      {"type", layer, Tensor::allocate(DType::kI32, {128}), "is I32; it must be F32"},
  };
  const TempFolder folder;
  save_model(folder / "m", {testing::layer_tensors(0)});
  for (const ImportanceCase& one : cases) {
    save_model_file(folder / "i.safetensors", {{one.tensor, one.values}});
    EXPECT_THAT(
        message_of<FormatError>([&] { plan_of(folder / "m", {}, folder / "i.safetensors"); }),
        AllOf(HasSubstr("[importance]"), HasSubstr(one.message)))
        << one.name;
  }
}

TEST(Importance, SkippedLayersAreKnown) {
  const TempFolder folder;
  NamedTensors tensors = testing::layer_tensors(0);
  tensors.emplace_back("lm_head.weight", random_tensor(DType::kF32, {8, 16}, 1));
  save_model(folder / "m", {tensors});
  save_model_file(folder / "i.safetensors", {{"lm_head", float_tensor(ones_but(16, 0, 2))}});
  EXPECT_NO_THROW(plan_of(folder / "m", {}, folder / "i.safetensors"));
}

TEST(Importance, ReadsEveryFloatType) {
  const TempFolder folder;
  const LayerDescription layer{"a", "a.weight", {}, DType::kF32, {4, 3}};
  const std::vector<float> values = {0.5f, 0.0f, 1.25f};
  Tensor f64 = Tensor::allocate(DType::kF64, {3});
  std::copy(values.begin(), values.end(), f64.data<double>());
  Tensor f16 = Tensor::allocate(DType::kF16, {3});
  const std::uint16_t halves[] = {0x3800, 0x0000, 0x3D00};
  std::copy_n(halves, 3, f16.data<std::uint16_t>());
  Tensor bf16 = Tensor::allocate(DType::kBF16, {3});
  const std::uint16_t brains[] = {0x3F00, 0x0000, 0x3FA0};
  std::copy_n(brains, 3, bf16.data<std::uint16_t>());
  for (const Tensor& tensor : {float_tensor(values), f64, f16, bf16}) {
    save_model_file(folder / "i.safetensors", {{"a", tensor}});
    const ImportanceFile file(folder / "i.safetensors");
    file.check(layer);
    EXPECT_EQ(file.read(layer, 0), values) << dtype_name(tensor.dtype);
  }
}

TEST(Importance, FusedExperts) {
  const TempFolder folder;
  const LayerDescription layer{"a", "a", {}, DType::kF32, {2, 4, 3}};
  Tensor rows = Tensor::allocate(DType::kF32, {2, 3});
  const float values[] = {1, 2, 3, 4, 5, 6};
  std::copy_n(values, 6, rows.data<float>());
  save_model_file(folder / "i.safetensors", {{"a", rows}});
  const ImportanceFile each(folder / "i.safetensors");
  each.check(layer);
  EXPECT_THAT(each.read(layer, 1), ElementsAre(4, 5, 6));
  save_model_file(folder / "j.safetensors", {{"a", float_tensor({7, 8, 9})}});
  const ImportanceFile shared(folder / "j.safetensors");
  shared.check(layer);
  EXPECT_THAT(shared.read(layer, 1), ElementsAre(7, 8, 9));

  std::fill_n(rows.data<float>() + 3, 3, 0.0f);
  save_model_file(folder / "k.safetensors", {{"a", rows}});
  EXPECT_THAT(
      message_of<FormatError>([&] { ImportanceFile(folder / "k.safetensors").check(layer); }),
      AllOf(HasSubstr("expert 1"), HasSubstr("all zeros")));
}

}  // namespace
}  // namespace hqq

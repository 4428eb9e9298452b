// What a tensor is: by its name, its shape, what lies beside it and the model types.
#include "src/model/roles.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "hqq/error.hpp"
#include "tests/cpp/support/message_of.hpp"
#include "tests/cpp/support/model_test_util.hpp"

namespace hqq {
namespace {

using ::testing::HasSubstr;
using testing::message_of;

struct Named {
  std::string name;
  std::vector<std::int64_t> shape;
  DType dtype = DType::kBF16;
};

Roles roles_of(const std::vector<Named>& tensors, const std::string& config = "") {
  std::vector<TensorInfo> infos;
  for (const Named& tensor : tensors) infos.push_back({tensor.name, tensor.dtype, tensor.shape});
  std::vector<const TensorInfo*> pointers;
  for (const TensorInfo& info : infos) pointers.push_back(&info);
  return Roles(config, pointers);
}

// Of the first tensor.
Role role_of(const std::vector<Named>& tensors, const std::string& config = "") {
  return roles_of(tensors, config).role(tensors[0].name);
}

Role role_of(const std::string& layer) { return role_of({{layer + ".weight", {8, 16}}}); }

constexpr const char* kEmbeddings[] = {"model.embed_tokens",
                                       "transformer.wte",
                                       "transformer.wpe",
                                       "shared",
                                       "gpt_neox.embed_in",
                                       "bert.embeddings.word_embeddings",
                                       "bert.embeddings.token_type_embeddings",
                                       "text.token_embedding",
                                       "x_embedder",
                                       "tok_embeddings",
                                       "model.embed_tokens_per_layer",
                                       "block.0.layer.0.SelfAttention.relative_attention_bias",
                                       "model.decoder.embed_tokens.3",
                                       "transformer.w",
                                       "input_embeds_layers.0",
                                       "position_embeds_layer",
                                       "decoder.mask_tokens",
                                       "iou_token",
                                       "rel_pos_emb",
                                       "quantizers.0.codebook",
                                       "encoder.pe_k",
                                       "char_embeddings.HashBucketCodepointEmbedder_7",
                                       "embedder.position_embedding_table"};

constexpr const char* kRouters[] = {"model.layers.0.mlp.gate",
                                    "model.layers.0.block_sparse_moe.gate",
                                    "model.layers.0.mlp.router",
                                    "mlp.router.classifier",
                                    "model.layers.0.feed_forward.router",
                                    "model.layers.0.mlp.shared_expert_gate",
                                    "backbone.layers.1.mixer.gate",
                                    "model.layers.0.mlp.text_moe.gate",
                                    "model.layers.0.mlp.vision_moe.gate",
                                    "transformer.blocks.0.ffn.router.layer",
                                    "model.layers.0.mlp.router.gate",
                                    "model.layers.0.mlp.router.router_mlp.fc1",
                                    "model.layers.0.mlp.gate.wg",
                                    "router",
                                    "mlp.gate",
                                    "layers.0.moe_layer.gate",
                                    "layers.0.sparse_moe.gate"};

HqqConfig without_skips() {
  HqqConfig config;
  config.skip_modules.clear();
  return config;
}

TEST(Role, TextAndBack) {
  for (const Role role : {Role::kNone, Role::kLinear, Role::kHead, Role::kEmbedding, Role::kRouter,
                          Role::kExperts, Role::kConv1d, Role::kConv2d}) {
    EXPECT_EQ(role_from_string(to_string(role)), role);
  }
  EXPECT_THAT(message_of<std::invalid_argument>([] { role_from_string("layer"); }),
              HasSubstr("role \"layer\" must be one of none, linear"));
}

TEST(Role, LinearWeights) {
  for (const char* name :
       {"model.layers.0.self_attn.q_proj", "encoder.layer.3.output.dense",
        "model.layers.0.mlp.experts.3.w1", "model.layers.0.mlp.gate_proj", "classifier",
        "transformer.h.0.attn.c_attn", "model.layers.0.mlp.shared_expert.up_proj", "encoder",
        "mlp.0", "gate", "attn.gate", "vision.patch_embed", "head", "x.embed_proj_out.out_proj"}) {
    EXPECT_EQ(role_of(name), Role::kLinear) << name;
  }
  for (const DType dtype : {DType::kF64, DType::kF32, DType::kF16, DType::kBF16}) {
    EXPECT_EQ(role_of({{"a.weight", {8, 16}, dtype}}), Role::kLinear);
  }
}

TEST(Role, NoWeights) {
  EXPECT_EQ(role_of({{"norm.weight", {16}}}), Role::kNone);
  EXPECT_EQ(role_of({{"conv.weight", {8, 16, 3}}}), Role::kNone);
  EXPECT_EQ(role_of({{"conv.weight", {8, 16, 3, 3}}}), Role::kNone);
  EXPECT_EQ(role_of({{"q_proj.lora_A", {8, 16}}}), Role::kNone);
  EXPECT_EQ(role_of({{"a.weight", {8, 16}, DType::kI32}}), Role::kNone);
  EXPECT_EQ(role_of({{"a.weight", {8, 16}, DType::kF8E4M3}}), Role::kNone);
  EXPECT_EQ(role_of({{"a.weight", {0, 16}}}), Role::kNone);
  for (const char* norm : {"self_attn.q_norm", "layer_norm1", "ln_f", "LayerNorm", "norm"}) {
    EXPECT_EQ(role_of(norm), Role::kNone) << norm;
  }
  EXPECT_EQ(role_of("adaln_proj"), Role::kLinear);
  EXPECT_EQ(role_of("objective"), Role::kNone);
  EXPECT_EQ(role_of("layers.0.attn.wo_a"), Role::kNone);
  EXPECT_EQ(roles_of({{"a.weight", {8, 16}}}).role("b.weight"), Role::kNone);
}

TEST(Role, Adapters) {
  for (const char* name : {"q_proj.lora_A.default", "q_proj.lora_A", "wte.lora_embedding_B",
                           "q_proj.hada_w1_a", "lora_B.default", "mlp.gate.lora_A.default"}) {
    EXPECT_EQ(role_of(name), Role::kNone) << name;
  }
  for (const char* name : {"q_proj.base_layer", "lora_", "lora", "flora_A", "explora_b"}) {
    EXPECT_EQ(role_of(name), Role::kLinear) << name;
  }
}

TEST(Role, PointwiseConvolutions) {
  EXPECT_EQ(role_of({{"conv.weight", {8, 16, 1, 1}}}), Role::kConv2d);
  EXPECT_EQ(role_of({{"conv.weight", {8, 16, 1}}}), Role::kNone);
}

TEST(Role, Embeddings) {
  for (const char* name : kEmbeddings) EXPECT_EQ(role_of(name), Role::kEmbedding) << name;
}

// An nn.Embedding adds none.
TEST(Role, WhatHasABiasIsNoEmbedding) {
  for (const char* name : kEmbeddings) {
    const std::string layer = name;
    const std::vector<Named> tensors = {{layer + ".weight", {8, 16}}, {layer + ".bias", {8}}};
    EXPECT_EQ(role_of(tensors), Role::kLinear) << name;
  }
}

TEST(Role, Routers) {
  for (const char* name : kRouters) EXPECT_EQ(role_of(name), Role::kRouter) << name;
  // GPT-OSS has a bias, others a bare parameter.
  EXPECT_EQ(role_of({{"mlp.router.weight", {8, 16}}, {"mlp.router.bias", {8}}}), Role::kRouter);
  EXPECT_EQ(role_of({{"mlp.router.matrix", {8, 16}}}), Role::kRouter);
}

TEST(Role, ARowForEachExpertIsARouter) {
  const Named choice = {"layers.0.choose.weight", {4, 16}};
  EXPECT_EQ(role_of({choice, {"layers.0.experts.up_proj", {4, 32, 16}}}), Role::kRouter);
  EXPECT_EQ(role_of({choice, {"layers.0.experts.up_proj.W_q", {4, 32, 8}, DType::kU8}}),
            Role::kRouter);
  EXPECT_EQ(role_of({choice,
                     {"layers.0.experts.3.w1.weight", {32, 16}},
                     {"layers.0.experts.0.w1.weight", {32, 16}}}),
            Role::kRouter);
  EXPECT_EQ(role_of({choice, {"layers.0.experts.up_proj", {8, 32, 16}}}), Role::kLinear);
  EXPECT_EQ(role_of({choice, {"layers.1.experts.up_proj", {4, 32, 16}}}), Role::kLinear);
  EXPECT_EQ(role_of({choice, {"layers.0.some_experts.up_proj", {4, 32, 16}}}), Role::kLinear);
  // An expert of a block whose experts have four rows is none.
  EXPECT_EQ(role_of({{"experts.3.w1.weight", {4, 16}}, {"experts.0.w1.weight", {4, 16}}}),
            Role::kLinear);
}

TEST(Role, Heads) {
  EXPECT_EQ(role_of("lm_head"), Role::kHead);
  EXPECT_EQ(role_of("language_model.lm_head"), Role::kHead);
  EXPECT_EQ(role_of("embed_out"), Role::kHead);
  // Logits over the vocabulary, not over classes.
  EXPECT_EQ(role_of({{"head.weight", {32, 16}}, {"embed.weight", {32, 16}}}), Role::kHead);
  EXPECT_EQ(role_of({{"head.weight", {10, 16}}, {"embed.weight", {32, 16}}}), Role::kLinear);
}

TEST(Role, FusedExperts) {
  for (const char* name : {"gate_up_proj", "down_proj", "gate_proj", "up_proj", "fc1", "fc2",
                           "w13_weight", "w2_weight"}) {
    const std::string layer = std::string("model.layers.0.mlp.experts.") + name;
    EXPECT_EQ(role_of({{layer, {4, 8, 16}}}), Role::kExperts);
    EXPECT_EQ(role_of({{layer + ".weight", {4, 8, 16}}}), Role::kExperts);
    // A bias of all experts.
    EXPECT_EQ(role_of({{layer, {4, 8}}}), Role::kNone);
    EXPECT_EQ(role_of({{layer + "_bias", {4, 8}}}), Role::kNone);
  }
  EXPECT_EQ(role_of({{"block_sparse_moe.input_linear.weight", {4, 8, 16}}}), Role::kExperts);
  EXPECT_EQ(role_of({{"block_sparse_moe.output_linear.weight", {4, 8, 16}}}), Role::kExperts);
  EXPECT_EQ(role_of({{"mlp.input_linear.weight", {4, 8, 16}}}), Role::kNone);
  EXPECT_EQ(role_of({{"model.layers.0.mlp.down_proj", {4, 8, 16}}}), Role::kNone);
  EXPECT_EQ(role_of({{"model.layers.0.mlp.experts.conv.weight", {4, 8, 16}}}), Role::kNone);
}

TEST(Role, ExpertsThatNoLoaderTakesPacked) {
  const std::vector<Named> fused = {{"layers.0.feed_forward.experts.gate_up_proj", {4, 8, 16}}};
  const std::vector<Named> listed = {{"layers.0.mlp.experts.3.up_proj.weight", {8, 16}}};
  const std::string llama4 = R"({"text_config": {"model_type": "llama4_text"}})";
  EXPECT_EQ(role_of(fused, llama4), Role::kNone);
  EXPECT_EQ(role_of(fused, R"({"model_type": "jamba"})"), Role::kExperts);
  EXPECT_EQ(role_of(listed, R"({"model_type": "longcat_flash"})"), Role::kNone);
  EXPECT_EQ(role_of(listed, R"({"model_type": "qwen3_moe"})"), Role::kLinear);
  EXPECT_EQ(role_of({{"layers.0.q_proj.weight", {8, 16}}}, llama4), Role::kLinear);
}

TEST(Role, WeightsOfMultiheadAttention) {
  const Named out = {"attn.out_proj.weight", {16, 16}};
  for (const char* own : {"attn.in_proj_weight", "attn.in_proj_bias", "attn.q_proj_weight"}) {
    EXPECT_EQ(role_of({out, {own, {48, 16}}}), Role::kNone) << own;
  }
  EXPECT_EQ(role_of({out, {"attn.in_proj.weight", {48, 16}}}), Role::kLinear);
  EXPECT_EQ(role_of({out, {"other.in_proj_weight", {48, 16}}}), Role::kLinear);
  EXPECT_EQ(role_of({{"out_proj.weight", {16, 16}}, {"in_proj_weight", {48, 16}}}), Role::kNone);
  // I-BERT.
  EXPECT_EQ(role_of({{"a.weight", {8, 16}}, {"a.weight_integer", {8, 16}}}), Role::kNone);
}

TEST(Role, TheBiasTellsWhatIsStoredTransposed) {
  const Named weight = {"h.0.attn.c_attn.weight", {16, 48}};
  EXPECT_EQ(role_of({weight, {"h.0.attn.c_attn.bias", {48}}}), Role::kConv1d);
  EXPECT_EQ(role_of({weight, {"h.0.attn.c_attn.bias", {16}}}), Role::kLinear);
  // A linear layer in spite of its model's type: that of another part of it.
  const std::string gpt2 = R"({"model_type": "gpt2"})";
  EXPECT_EQ(role_of({weight, {"h.0.attn.c_attn.bias", {16}}}, gpt2), Role::kLinear);
  // A square one is what its neighbours are.
  const Named square = {"h.0.attn.q_attn.weight", {16, 16}}, bias = {"h.0.attn.q_attn.bias", {16}};
  const Named neighbour = {"h.0.attn.c_attn.bias", {48}};
  EXPECT_EQ(role_of({square, bias, weight, neighbour}), Role::kConv1d);
  EXPECT_EQ(role_of({square, bias}), Role::kLinear);
}

TEST(Role, ModelTypesWithConv1d) {
  const std::vector<Named> tensors = {{"decoder.h.0.mlp.c_fc.weight", {16, 16}}};
  EXPECT_EQ(role_of(tensors), Role::kLinear);
  EXPECT_EQ(role_of(tensors, R"({"model_type": "gpt_bigcode"})"), Role::kLinear);
  EXPECT_EQ(role_of(tensors, R"({"model_type": "gpt2"})"), Role::kConv1d);
  EXPECT_EQ(role_of(tensors, R"({"model_type": "a", "parts": [{"b": {"model_type": "gpt2"}}]})"),
            Role::kConv1d);
  EXPECT_EQ(role_of({{"score.weight", {8, 16}}}, R"({"model_type": "gpt2"})"), Role::kLinear);
  EXPECT_THROW(role_of(tensors, "{"), FormatError);
}

TEST(Settings, EmbeddingsStayUnlessARuleNamesThem) {
  LayerConfig eight;
  eight.nbits = BitWidth::k8;
  for (const char* name : kEmbeddings) {
    const std::string full = name;
    const auto settings = [&](const HqqConfig& config) {
      return settings_of(full, Role::kEmbedding, config);
    };
    HqqConfig config = without_skips();
    EXPECT_EQ(settings(config), std::nullopt) << name;
    config.dynamic_config = {{"other.layers.*", LayerConfig{}}};
    EXPECT_EQ(settings(config), std::nullopt) << name;
    for (const std::string& key : {full, layer_tag(full), "*" + full.substr(1), "re:.*" + full}) {
      config.dynamic_config = {{key, eight}};
      EXPECT_EQ(settings(config), eight) << key;
      config.dynamic_config = {{key, std::nullopt}};
      EXPECT_EQ(settings(config), std::nullopt) << key;
    }
    // skip_modules wins over a pattern, as everywhere.
    config.dynamic_config = {{"*", eight}};
    config.skip_modules = {full};
    EXPECT_EQ(settings(config), std::nullopt) << name;
  }
}

TEST(Settings, RoutersStayInAnyCase) {
  HqqConfig config = without_skips();
  EXPECT_TRUE(settings_of("mlp.gate", Role::kLinear, config));
  config.dynamic_config = {{"mlp.gate", LayerConfig{}}};
  EXPECT_EQ(settings_of("mlp.gate", Role::kRouter, config), std::nullopt);
}

TEST(Settings, HeadsAreSkippedAsLmHead) {
  HqqConfig config;
  EXPECT_EQ(settings_of("embed_out", Role::kHead, config), std::nullopt);
  EXPECT_TRUE(settings_of("embed_out", Role::kLinear, config));
  EXPECT_TRUE(settings_of("embed_out", Role::kHead, without_skips()));
  config.dynamic_config = {{"embed_out", LayerConfig{}}};
  EXPECT_TRUE(settings_of("embed_out", Role::kHead, config));
}

}  // namespace
}  // namespace hqq

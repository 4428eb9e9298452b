// Sources that are not the dense model itself: quantized already, adapters, 8-bit floats; and files
// beside the checkpoint.
#include "src/io/checkpoint/source_check.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "hqq/error.hpp"
#include "src/io/checkpoint/quantized_source.hpp"
#include "tests/cpp/support/message_of.hpp"
#include "tests/cpp/support/model_test_util.hpp"

namespace hqq {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::layer_tensors;
using testing::message_of;
using testing::NamedTensors;
using testing::random_tensor;
using testing::save_model;
using testing::save_model_file;
using testing::TempFolder;
using testing::write_bytes;

Tensor zeros(DType dtype, std::vector<std::int64_t> shape = {8, 8}) {
  return Tensor::allocate(dtype, std::move(shape));
}

// "X.weight F8_E4M3", with two dimensions, or "X.scale F32 1" with their number.
ListedTensor listed(const std::string& text) {
  const std::size_t space = text.find(' ');
  std::string dtype = text.substr(space + 1);
  std::size_t dimensions = 2;
  if (const std::size_t number = dtype.find(' '); number != std::string::npos) {
    dimensions = std::stoul(dtype.substr(number + 1));
    dtype.resize(number);
  }
  return {text.substr(0, space), dtype, std::vector<std::int64_t>(dimensions, 8), "f.safetensors"};
}

std::string found_in(const std::vector<std::string>& tensors) {
  std::vector<ListedTensor> list = {listed("model.norm.weight BF16 1"),
                                    listed("model.layers.0.mlp.up_proj.weight BF16")};
  for (const std::string& tensor : tensors) list.push_back(listed(tensor));
  return quantization_in_tensors(list).value_or("");
}

TEST(QuantizedTensors, FormsOfTools) {
  EXPECT_EQ(found_in({"a.weight F8_E4M3", "a.weight_scale_inv F32"}),
            "tensor \"a.weight\" in \"f.safetensors\" is F8_E4M3 and has \"a.weight_scale_inv\" "
            "beside it");
  EXPECT_EQ(found_in({"a.qweight I32"}),
            "tensor \"a.qweight\" in \"f.safetensors\" is I32, the form of GPTQ or AWQ");
  const std::vector<std::vector<std::string>> forms = {
      {"a.weight F8_E5M2", "a.scale F32"},
      {"a.weight F8_E4M3", "a.weight_scale F8_E8M0"},
      {"a.weight F8_E4M3", "a.scale_weight F32 1"},
      {"a.weight I8", "a.activation.qscale F32 1"},
      {"a.weight F8_E4M3", "a.input_scale F32 0", "a.weight_scale F32 0"},
      {"a.weight U8", "a.weight_scale F8_E4M3", "a.weight_scale_2 F32 0"},
      {"a.weight F4", "a.weight_scale F8_E8M0"},
      {"a.weight U32", "a.scales BF16", "a.biases BF16"},
      {"a.weight I8", "a.SCB F32 1", "a.weight_format U8 0"},
      {"a.weight I8", "a.weight_scales F16 1"},
      {"a.weight I8", "a.weight_quantizer.scale F32 1"},
      {"a.weight U8", "a.weight.absmax U8 1", "a.weight.quant_map F32 1"},
      // quant_storage bfloat16, for FSDP.
      {"a.weight BF16", "a.weight.quant_state.bitsandbytes__nf4 U8 1"},
      {"a.qweight I32", "a.qzeros I32", "a.scales F16", "a.g_idx I32 1"},
      {"a.weight_packed I32", "a.weight_scale BF16", "a.weight_shape I64 1"},
      {"experts.gate_up_proj F8_E4M3 3", "experts.gate_up_proj_scale_inv F32 3"},
      {"experts.gate_up_proj_blocks U8 4", "experts.gate_up_proj_scales U8 3"},
      {"experts.down_proj F8_E4M3 3", "experts.down_proj.scale F32 3"},
      {"experts.w13_weight U8 3", "experts.w13_weight_scale F8_E4M3 3"},
      {"a.weight._data I8", "a.weight._scale F32"},
      {"a.weight._data._data U8", "a.weight._scale F32", "a.weight._shift F32"},
      {"a._weight_qdata I8", "a._weight_scale F32"},
      {"a.W_q U8", "a.meta U8 1"},
      {"a.W_q U8", "a.scale F16", "a.zero F16"},
      {"a.W_q F16", "a.scale F16", "a.view_as_float U8 0"},
      {"a.codes I16 3", "a.codebooks F16 3", "a.scales F16 4"},
      {"a.indices I16 3", "a.centroids.weight F16"},
      {"a.q_weight I32", "a.q_scale I32", "a.q_invperm I32 1"},
      {"a.trellis I16 3", "a.suh F16 1", "a.svh F16 1"},
  };
  for (const auto& form : forms) EXPECT_THAT(found_in(form), HasSubstr("tensor \"")) << form[0];
}

TEST(QuantizedTensors, DenseModelsHaveSuchNamesToo) {
  EXPECT_EQ(found_in({"logit_scale F32 0", "model.layer_scale.weight F32 1", "a.scale BF16 1",
                      "a.weight BF16", "a.weight_scale F32 1", "a.scales F32"}),
            "");
  EXPECT_EQ(found_in({"q_norm.weight BF16 1", "q_norm.weight_scale F32 1"}), "");
  EXPECT_EQ(found_in({"emb.position_ids I64", "bn.num_batches_tracked I64 0", "attn.scale F32 1",
                      "attn.bias U8 4", "attn.mask BOOL", "attn.relative_position_index I64"}),
            "");
  EXPECT_EQ(found_in({"attn.W_q F32", "attn.W_k F32", "attn.scale F32 0"}), "");
  EXPECT_EQ(found_in({"num_blocks I32 0", "num_scales I32 0", "down_blocks BF16"}), "");
  EXPECT_EQ(found_in({"vq.codes I64", "vq.codebooks F32", "vq.indices I64", "vq.centroids F32"}),
            "");
  // Of another layer.
  EXPECT_EQ(found_in({"a.weight F8_E4M3", "ab.weight_scale F32", "b.scale F32"}), "");
}

TEST(QuantizedConfig, MarksAtAnyDepth) {
  EXPECT_EQ(quantization_in_config(R"({"quantization_config": {"quant_method": "fp8"}})"),
            "config.json has quantization_config of method \"fp8\"");
  EXPECT_EQ(quantization_in_config(
                R"({"n": NaN, "a": [{"text_config": {"quantization_config": {"x": 1}}}]})"),
            "config.json has a.0.text_config.quantization_config of an unnamed method");
  EXPECT_EQ(quantization_in_config(R"({"compression_config": {"quant_method": "sparse"}})"),
            "config.json has compression_config of method \"sparse\"");
  EXPECT_EQ(quantization_in_config(R"({"quantization": {"group_size": 64, "bits": 4}})"),
            "config.json has quantization of 4 bits");
  EXPECT_EQ(quantization_in_config(R"({"quantization": {"quant_algo": "NVFP4"}})"),
            "config.json has quantization of method \"NVFP4\"");
  EXPECT_EQ(quantization_in_config(R"({"quantization_config": "awq"})"),
            "config.json has quantization_config of an unnamed method");
}

TEST(QuantizedConfig, EmptyMarksSayNothing) {
  for (const char* config :
       {"", "{}", R"({"quantization_config": null})", R"({"quantization_config": {}})",
        R"({"text_config": {"quantization_config": {}, "compression_config": null}})",
        R"({"quantization": {"quant_algo": null, "kv_cache_quant_algo": null}})",
        R"({"quantization": null})", R"({"quantizer": {"bits": 4}, "quantization": "none"})",
        R"({"codec": {"quantization": {"codebook_size": 1024}}})"}) {
    EXPECT_EQ(quantization_in_config(config), std::nullopt) << config;
  }
}

class Source : public ::testing::Test {
 protected:
  std::string refusal() {
    return message_of<std::invalid_argument>(
        [&] { check_dense_source(open_dense_source(model_)); });
  }
  // What a loader is told, which names the files itself.
  std::string found_by_loader(const std::vector<std::string>& names) {
    std::vector<std::filesystem::path> files;
    for (const std::string& name : names) files.push_back(model_ / name);
    return find_quantization(files).value_or("");
  }

  TempFolder folder_;
  std::filesystem::path model_ = folder_ / "m";
};

TEST_F(Source, DenseOnesPass) {
  save_model(model_, testing::sharded_model());
  EXPECT_NO_THROW(check_dense_source(open_dense_source(model_)));
  EXPECT_THAT(source_warnings(Checkpoint(model_), 1, false), IsEmpty());
}

TEST_F(Source, OneLayerOfTheSecondShardWithoutAConfig) {
  NamedTensors second = layer_tensors(1);
  second.emplace_back("model.layers.1.up_proj.weight", zeros(DType::kF8E4M3));
  save_model(model_, {layer_tensors(0),
                      second,
                      {{"model.layers.1.up_proj.weight_scale", zeros(DType::kF32, {1})}}});
  std::filesystem::remove(model_ / "config.json");
  EXPECT_THAT(refusal(), AllOf(HasSubstr("[quantize]"), HasSubstr("already quantized: tensor"),
                               HasSubstr("model-00002-of-00003.safetensors"),
                               HasSubstr("\"model.layers.1.up_proj.weight_scale\" beside it; an "
                                         "unquantized checkpoint is needed")));
}

TEST_F(Source, FilesThatToolsLeave) {
  for (const char* name : {"quantize_config.json", "quant_config.json", "hf_quant_config.json",
                           "quantization_config.json", "quanto_qmap.json"}) {
    save_model(model_, {layer_tensors(0)});
    write_bytes(model_ / name, "{}");
    EXPECT_THAT(refusal(), HasSubstr("it has the file \"" + std::string(name) + "\" of ")) << name;
    EXPECT_THAT(found_by_loader({"model.safetensors"}), HasSubstr(name));
    std::filesystem::remove_all(model_);
  }
  save_model(model_, {layer_tensors(0)});
  write_bytes(model_ / "preprocessor_config.json", "{}");
  EXPECT_NO_THROW(check_dense_source(Checkpoint(model_)));
}

// A file of 64 bytes of data whose tensors have types that hqq::DType lacks.
std::string exotic_file() {
  const std::string header =
      R"({"a.weight":{"dtype":"F4","shape":[8,8],"data_offsets":[0,32]},)"
      R"("a.weight_scale":{"dtype":"F8_E8M0","shape":[32],"data_offsets":[32,64]}})";
  std::string file(8, '\0');
  file[0] = static_cast<char>(header.size());
  return file + header + std::string(64, '\0');
}

TEST_F(Source, QuantizedTypesThatNoTensorHasHere) {
  save_model(model_, {layer_tensors(0)});
  write_bytes(model_ / "model.safetensors", exotic_file());
  EXPECT_THAT(message_of<FormatError>([&] { Checkpoint{model_}; }),
              AllOf(HasSubstr("tensor \"a.weight\""), HasSubstr("unknown dtype \"F4\"")));
  EXPECT_THAT(refusal(), HasSubstr("is already quantized: tensor \"a.weight\" in "
                                   "\"model.safetensors\" is F4 and has \"a.weight_scale\""));
  EXPECT_THAT(found_by_loader({"model.safetensors"}), HasSubstr("is F4"));
}

TEST_F(Source, LoadersReadWhatTheyCan) {
  EXPECT_EQ(find_quantization(std::vector<std::filesystem::path>{}), std::nullopt);
  save_model(model_, {layer_tensors(0)}, R"({"x": {"quantization_config": {"bits": 3}}})");
  write_bytes(model_ / "broken.safetensors", "broken file");
  write_bytes(model_ / "short.safetensors", "ab");
  write_bytes(model_ / "pytorch_model.bin", "pickle");
  EXPECT_EQ(found_by_loader({"pytorch_model.bin"}),
            "config.json has x.quantization_config of 3 bits");
  write_bytes(model_ / "config.json", "{broken");
  EXPECT_EQ(found_by_loader({"broken.safetensors", "short.safetensors", "gone.safetensors",
                             "pytorch_model.bin", "model.safetensors"}),
            "");
}

TEST_F(Source, EightBitFloatsWithoutAScale) {
  NamedTensors tensors = layer_tensors(0);
  tensors.emplace_back("buffer", zeros(DType::kF8E4M3));
  tensors.emplace_back("norm.weight", zeros(DType::kF8E4M3, {8}));
  save_model(model_, {tensors});
  EXPECT_NO_THROW(check_dense_source(Checkpoint(model_)));

  tensors.emplace_back("a.weight", zeros(DType::kF8E5M2));
  save_model(model_, {tensors});
  EXPECT_THAT(refusal(), AllOf(HasSubstr("\"a.weight\" (F8_E5M2 [8, 8])"),
                               HasSubstr("8-bit float weight without a scale; convert it to F16")));
  // A loader casts it, which gives the same values.
  EXPECT_EQ(found_by_loader({"model.safetensors"}), "");
}

TEST_F(Source, Adapters) {
  std::filesystem::create_directories(model_);
  write_bytes(model_ / "adapter_config.json", "{}");
  const NamedTensors adapter = {
      {"base_model.model.a.lora_A.weight", random_tensor(DType::kF32, {8, 16}, 1)}};
  save_model_file(model_ / "adapter_model.safetensors", adapter);
  EXPECT_THAT(refusal(), AllOf(HasSubstr("holds an adapter (adapter_config.json)"),
                               HasSubstr("merge it into its base model first")));
  model_ = folder_ / "m/adapter_model.safetensors";
  EXPECT_THAT(refusal(), AllOf(HasSubstr("is an adapter"), HasSubstr("a.lora_A.weight"),
                               HasSubstr("merge it into its base model first")));
  model_ = folder_ / "both";
  save_model(model_, {layer_tensors(0)});
  write_bytes(model_ / "adapter_config.json", "{}");
  EXPECT_THAT(refusal(), AllOf(HasSubstr("has an adapter_config.json"), HasSubstr("merge it")));
  // A model that comes with adapters in it.
  model_ = folder_ / "with";
  NamedTensors tensors = layer_tensors(0);
  tensors.emplace_back("model.layers.0.a.lora_A.speech.weight", zeros(DType::kF32));
  save_model(model_, {tensors});
  EXPECT_NO_THROW(check_dense_source(Checkpoint(model_)));
}

TEST_F(Source, WeightsThatAreNotPartOfTheCheckpointAreNamed) {
  save_model(model_, testing::sharded_model());
  save_model_file(model_ / "consolidated.safetensors", layer_tensors(0));
  const auto report = quantize_checkpoint(model_, folder_ / "q", {});
  ASSERT_EQ(report.warnings.size(), 1u);
  EXPECT_THAT(report.warnings[0],
              AllOf(HasSubstr("left out: \"consolidated.safetensors\" ("), HasSubstr("MB)")));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "q/consolidated.safetensors"));
}

TEST_F(Source, LargeCopiesInSubfoldersAreNamed) {
  save_model(model_, {layer_tensors(0)});
  std::filesystem::create_directories(model_ / "original");
  save_model_file(model_ / "original/model.safetensors", layer_tensors(0));
  const Checkpoint source(model_);
  const auto warnings = source_warnings(source, source.total_bytes() / 4, false);
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_THAT(warnings[0], HasSubstr("copied as they are, and take more than the quantized model: "
                                     "\"original/model.safetensors\" ("));
  // Parts of a sentence-transformers model are small.
  EXPECT_THAT(source_warnings(source, 2 * source.total_bytes(), false), IsEmpty());
}

TEST_F(Source, IntegerWeightsAreNamed) {
  NamedTensors tensors = layer_tensors(0);
  tensors.emplace_back("hash.weight", zeros(DType::kI32));
  save_model(model_, {tensors});
  const auto warnings = source_warnings(Checkpoint(model_), 1, false);
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_THAT(warnings[0], HasSubstr("copied as they are: \"hash.weight\" (I32 [8, 8])"));
}

}  // namespace
}  // namespace hqq

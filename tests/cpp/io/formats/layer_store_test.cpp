// Reading quantized layers, also from shards whose metadata lies.
#include "src/io/formats/layer_store.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "hqq/error.hpp"
#include "tests/cpp/support/message_of.hpp"
#include "tests/cpp/support/model_test_util.hpp"

namespace hqq {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::message_of;
using testing::random_tensor;
using testing::TempFolder;

using Json = nlohmann::ordered_json;

// A shard with one layer "a" [16, 64] at 4 bits.
class OneLayer : public ::testing::Test {
 protected:
  void SetUp() override {
    const Tensor W = random_tensor(DType::kF32, {16, 64}, 1);
    q_ = Quantizer().quantize(TensorView(W));
    description_ = {"a", "a.weight", q_.config, DType::kF32, {16, 64}};
    for (const auto& [field, tensor] : q_.tensors()) tensors_.emplace_back("a." + field, *tensor);
    metadata_ = Json::parse(describe_layers({description_}));
  }

  void save() const {
    std::vector<std::pair<std::string, const Tensor*>> pointers;
    for (const auto& [name, tensor] : tensors_) pointers.emplace_back(name, &tensor);
    save_safetensors(folder_ / "x.safetensors", pointers,
                     {{kLayersMetadataKey,
                       metadata_.is_string() ? metadata_.get<std::string>() : metadata_.dump()}});
  }
  std::string refusal() const {
    save();
    return message_of<FormatError>(
        [&] { read_stored_layers(SafetensorsFile(folder_ / "x.safetensors")); });
  }
  Json& layer() { return metadata_["layers"]["a"]; }

  TempFolder folder_;
  QuantizedTensor q_;
  LayerDescription description_;
  testing::NamedTensors tensors_;
  Json metadata_;
};

TEST_F(OneLayer, IsReadBack) {
  save();
  const Checkpoint checkpoint(folder_ / "x.safetensors");
  EXPECT_THAT(quantized_layers(checkpoint), ElementsAre("a"));
  const QuantizedTensor read = load_quantized(checkpoint, "a");
  EXPECT_EQ(read.config, q_.config);
  EXPECT_EQ(read.out_features, 16);
  EXPECT_EQ(read.in_features, 64);
  ASSERT_EQ(read.tensors().size(), q_.tensors().size());
  for (std::size_t i = 0; i < read.tensors().size(); ++i) {
    EXPECT_EQ(testing::bytes_of(*read.tensors()[i].second),
              testing::bytes_of(*q_.tensors()[i].second));
  }
  EXPECT_TRUE(is_quantized_by_us(checkpoint));

  const SafetensorsFile file(folder_ / "x.safetensors");
  const QuantizedTensor mapped = read_matrix(read_stored_layers(file)[0], 0, true);
  EXPECT_EQ(testing::bytes_of(mapped.W_q), testing::bytes_of(q_.W_q));
}

TEST_F(OneLayer, UnknownLayersAndExperts) {
  save();
  const Checkpoint checkpoint(folder_ / "x.safetensors");
  EXPECT_THAT(message_of<std::invalid_argument>([&] { load_quantized(checkpoint, "b"); }),
              AllOf(HasSubstr("no quantized layer \"b\""), HasSubstr("x.safetensors")));
  EXPECT_THAT(message_of<std::invalid_argument>([&] { load_quantized(checkpoint, "a", 1); }),
              HasSubstr("has 1 matrices, there is no expert 1"));
  EXPECT_THROW(load_quantized(checkpoint, "a", -1), std::invalid_argument);
}

TEST_F(OneLayer, WithoutMetadataThereAreNoLayers) {
  testing::save_model_file(folder_ / "x.safetensors", tensors_);
  const Checkpoint checkpoint(folder_ / "x.safetensors");
  EXPECT_THAT(quantized_layers(checkpoint), IsEmpty());
  EXPECT_FALSE(is_quantized_by_us(checkpoint));
  EXPECT_THROW(load_quantized(checkpoint, "a"), std::invalid_argument);
}

TEST_F(OneLayer, MetadataOfAnotherShape) {
  for (const char* text : {"", "1", "[]", "{}", "{\"format_version\": \"1\"}", "nul"}) {
    metadata_ = Json(text);
    EXPECT_THAT(refusal(), HasSubstr("x.safetensors")) << text;
  }
  metadata_ = {{"format_version", 2}, {"layers", Json::object()}};
  EXPECT_THAT(refusal(), HasSubstr("format_version is 2; this library reads version 1"));
  metadata_ = {{"format_version", 1}, {"layers", Json::array()}};
  EXPECT_THAT(refusal(), HasSubstr("an object named layers"));
  metadata_ = {{"format_version", 1}, {"layers", {{"a", 5}}}};
  EXPECT_THAT(refusal(), HasSubstr("must be an object"));
}

TEST_F(OneLayer, DescriptionsThatAreWrong) {
  const Json good = layer();
  for (const char* key : {"tensor", "dtype", "shape"}) {
    layer() = good;
    layer().erase(key);
    EXPECT_THAT(refusal(), HasSubstr(std::string("lacks ") + key));
  }
  const std::vector<std::tuple<std::string, Json, std::string>> cases = {
      {"tensor", "b.weight", "the layer name with or without .weight"},
      {"tensor", 1, "the layer name with or without .weight"},
      {"dtype", "int32", "dtype must be float64"},
      {"dtype", nullptr, "dtype must be float64"},
      {"shape", {16}, "2 or 3 dimensions"},
      {"shape", {1, 1, 16, 64}, "2 or 3 dimensions"},
      {"shape", "16", "2 or 3 dimensions"},
      {"shape", {16, 0}, "integers of at least 1"},
      {"shape", {16, -64}, "integers of at least 1"},
      {"shape", {16.5, 64}, "integers of at least 1"},
      {"shape", {std::uint64_t{1} << 63, 64}, "integers of at least 1"},
      {"shape", {std::int64_t{1} << 32, std::int64_t{1} << 32}, "more elements than"},
      {"shape", {std::int64_t{1} << 30, std::int64_t{1} << 30}, "more than 2^56"},
      {"shape", {16, 65}, "its description needs U8 [16, 33]"},
      {"shape", {17, 64}, "its description needs U8 [17, 32]"},
      {"shape", {1, 16, 64}, "its description needs U8 [1, 16, 32]"},
      {"nbits", 3, "its description needs U8 [16, 24]"},
      {"nbits", 9, "nbits is 9"},
      {"group_size", 32, "\"a.scale\" is F16 [16, 1], its description needs F16 [16, 2]"},
      {"group_size", 12, "group_size is 12"},
      {"meta_dtype", "float32", "\"a.scale\" is F16"},
      {"quant_scale", true, "\"a.scale\" is F16"},
      {"balance", "none", "\"a.col_scale\" does not belong to its description"},
      {"balance", "auto", "balance must be none or sinkhorn"},
      {"unknown", 1, "unknown key 'unknown'"},
  };
  for (const auto& [key, value, message] : cases) {
    layer() = good;
    layer()[key] = value;
    EXPECT_THAT(refusal(), AllOf(HasSubstr("layer \"a\""), HasSubstr(message)))
        << key << " " << value.dump();
  }
}

TEST_F(OneLayer, TensorsThatAreMissing) {
  const testing::NamedTensors good = tensors_;
  for (std::size_t i = 0; i < good.size(); ++i) {
    tensors_ = good;
    tensors_.erase(tensors_.begin() + static_cast<std::ptrdiff_t>(i));
    EXPECT_THAT(refusal(), HasSubstr("tensor \"" + good[i].first + "\" is missing"));
  }
  tensors_ = good;
  tensors_.emplace_back("a.zero_step", Tensor::allocate(DType::kF32, {1}));
  EXPECT_THAT(refusal(), HasSubstr("\"a.zero_step\" does not belong"));
}

// Two layers as save_pretrained of Transformers writes them: every shard describes both, and
// tensors of one layer lie in two shards.
class TwoShards : public ::testing::Test {
 protected:
  void SetUp() override {
    for (int i = 0; i < 2; ++i) {
      const Tensor W = random_tensor(DType::kF32, {16, 64}, static_cast<std::uint64_t>(i) + 1);
      q_.push_back(Quantizer().quantize(TensorView(W)));
      const std::string name = i == 0 ? "a" : "b";
      descriptions_.push_back({name, name + ".weight", q_[i].config, DType::kF32, {16, 64}});
    }
    for (auto& text : metadata_) text = describe_layers(descriptions_);
    // W_q of "a" is in the second shard, its other tensors are in the first; "b" is whole.
    for (const auto& [field, tensor] : q_[0].tensors()) {
      shards_[field == "W_q" ? 1 : 0].emplace_back("a." + field, *tensor);
    }
    for (const auto& [field, tensor] : q_[1].tensors()) {
      shards_[1].emplace_back("b." + field, *tensor);
    }
  }

  std::filesystem::path save() const {
    const std::filesystem::path folder = folder_ / "model";
    std::filesystem::create_directories(folder);
    Json weight_map = Json::object();
    for (std::size_t i = 0; i < 2; ++i) {
      const std::string name = "model-0000" + std::to_string(i + 1) + "-of-00002.safetensors";
      std::vector<std::pair<std::string, const Tensor*>> pointers;
      for (const auto& [key, tensor] : shards_[i]) {
        pointers.emplace_back(key, &tensor);
        weight_map[key] = name;
      }
      save_safetensors(folder / name, pointers, {{kLayersMetadataKey, metadata_[i]}});
    }
    std::ofstream(folder / "model.safetensors.index.json")
        << Json{{"metadata", Json::object()}, {"weight_map", weight_map}}.dump();
    return folder;
  }
  std::string refusal() const {
    const Checkpoint checkpoint(save());
    return message_of<FormatError>([&] { read_stored_layers(checkpoint); });
  }

  TempFolder folder_;
  std::vector<QuantizedTensor> q_;
  std::vector<LayerDescription> descriptions_;
  testing::NamedTensors shards_[2];
  std::string metadata_[2];
};

TEST_F(TwoShards, LayersAreFoundWhereverTheirTensorsLie) {
  const Checkpoint checkpoint(save());
  const std::vector<StoredLayer> layers = read_stored_layers(checkpoint);
  ASSERT_EQ(layers.size(), 2u);
  EXPECT_EQ(layers[0].shard, 1u);
  for (int i = 0; i < 2; ++i) {
    const std::string name = i == 0 ? "a" : "b";
    EXPECT_THAT(quantized_layers(checkpoint), ElementsAre("a", "b"));
    for (const QuantizedTensor& read :
         {load_quantized(checkpoint, name), read_matrix(layers[static_cast<std::size_t>(i)], 0)}) {
      const auto expected = q_[static_cast<std::size_t>(i)].tensors();
      const auto found = read.tensors();
      ASSERT_EQ(found.size(), expected.size());
      for (std::size_t k = 0; k < expected.size(); ++k) {
        EXPECT_EQ(testing::bytes_of(*found[k].second), testing::bytes_of(*expected[k].second));
      }
    }
  }
}

TEST_F(TwoShards, OneShardMayDescribeAll) {
  for (std::size_t only = 0; only < 2; ++only) {
    metadata_[only] = describe_layers(descriptions_);
    metadata_[1 - only] = describe_layers({});
    const Checkpoint checkpoint(save());
    EXPECT_THAT(quantized_layers(checkpoint), ElementsAre("a", "b"));
    EXPECT_EQ(testing::bytes_of(load_quantized(checkpoint, "a").W_q), testing::bytes_of(q_[0].W_q));
  }
}

TEST_F(TwoShards, ATensorThatIsInNoShard) {
  std::erase_if(shards_[0], [](const auto& tensor) { return tensor.first == "a.zero"; });
  EXPECT_THAT(refusal(), HasSubstr("tensor \"a.zero\" is missing"));
  shards_[0].clear();
  std::erase_if(shards_[1], [](const auto& tensor) { return tensor.first == "b.W_q"; });
  shards_[0].emplace_back("x", Tensor::allocate(DType::kF32, {1}));
  EXPECT_THAT(message_of<std::invalid_argument>([&] { load_quantized(Checkpoint(save()), "b"); }),
              HasSubstr("no quantized layer \"b\""));
}

TEST_F(TwoShards, ALayerThatIsInNoShard) {
  descriptions_.push_back({"c", "c.weight", q_[0].config, DType::kF32, {16, 64}});
  metadata_[1] = describe_layers(descriptions_);
  EXPECT_THAT(refusal(),
              AllOf(HasSubstr("model-00002-of-00002"),
                    HasSubstr("tensor \"c.W_q\" is missing; the metadata describes it")));
}

TEST_F(TwoShards, ShardsThatDisagree) {
  descriptions_[0].dtype = DType::kF16;
  metadata_[1] = describe_layers(descriptions_);
  EXPECT_THAT(refusal(), HasSubstr("layer \"a\" is described otherwise than in "
                                   "\"model-00001-of-00002.safetensors\""));
}

TEST(TensorSpecs, MatchWhatTheQuantizerMakes) {
  for (const BitWidth nbits : kAllBitWidths) {
    for (int variant = 0; variant < 16; ++variant) {
      LayerConfig config;
      config.nbits = nbits;
      config.axis = variant & 1;
      config.quant_scale = (variant & 2) != 0;
      config.quant_zero = (variant & 4) != 0;
      config.balance = (variant & 8) != 0 ? Balance::kSinkhorn : Balance::kNone;
      config.group_size = 24;
      const Tensor W = random_tensor(DType::kF32, {40, 100}, 3);
      QuantizedTensor q = Quantizer().quantize(TensorView(W), config, "a", {});
      const TensorSpecs specs = tensor_specs(config, 40, 100);
      std::size_t i = 0;
      for (const auto& [name, tensor] : q.fields()) {
        const TensorSpec& spec = specs[i++];
        EXPECT_EQ(spec.name, name);
        EXPECT_EQ(spec.present, bool(*tensor)) << name;
        if (!spec.present) continue;
        EXPECT_EQ(spec.dtype, tensor->dtype);
        EXPECT_EQ(spec.shape, tensor->shape);
        EXPECT_EQ(spec.nbytes(), tensor->nbytes());
      }
      EXPECT_EQ(nbytes_of(specs), static_cast<std::uint64_t>(q.nbytes()));
    }
  }
}

TEST(TensorSpecs, RefuseABalanceThatIsNotResolved) {
  EXPECT_THAT([] { tensor_specs(LayerConfig{}, 40, 100); },
              ThrowsMessage<std::invalid_argument>(
                  HasSubstr("balance is 'auto'; a stored layer has 'none' or 'sinkhorn'")));
}

TEST(TensorSpecs, RefuseAShapeThatIsNoMatrix) {
  LayerConfig config;
  config.balance = Balance::kNone;
  config.axis = 0;
  EXPECT_THAT(
      [&] { tensor_specs(config, 40, 0); },
      ThrowsMessage<std::invalid_argument>(HasSubstr("the shape [40, 0] is not that of a matrix")));
}

}  // namespace
}  // namespace hqq

// dequantize_checkpoint and diff_checkpoints.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "hqq/checkpoint.hpp"
#include "hqq/error.hpp"
#include "src/format/float_values.hpp"
#include "tests/cpp/support/message_of.hpp"
#include "tests/cpp/support/model_test_util.hpp"

namespace hqq {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
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

Tensor read_tensor(const fs::path& folder, const std::string& name) {
  const Checkpoint checkpoint(folder);
  const auto [info, shard] = checkpoint.find(name);
  return info == nullptr ? Tensor() : checkpoint.shard(shard).read(*info);
}

class Dense : public ::testing::Test {
 protected:
  void SetUp() override {
    save_model(folder_ / "m", sharded_model());
    quantize_checkpoint(folder_ / "m", folder_ / "q", {});
  }
  TempFolder folder_;
};

TEST_F(Dense, DequantizeIsTheInverse) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64}) {
    CheckpointOptions options;
    options.force = true;
    dequantize_checkpoint(folder_ / "q", folder_ / "d", dtype, options);
    const Checkpoint source(folder_ / "m"), quantized(folder_ / "q"), dense(folder_ / "d");
    EXPECT_EQ(dense.shard_names(), source.shard_names());
    for (std::size_t s = 0; s < source.shard_count(); ++s) {
      const auto& before = source.shard(s).tensors();
      const auto& after = dense.shard(s).tensors();
      ASSERT_EQ(before.size(), after.size());
      for (std::size_t i = 0; i < before.size(); ++i) {
        EXPECT_EQ(after[i].name, before[i].name);
        EXPECT_EQ(after[i].shape, before[i].shape);
        const std::string layer = after[i].name.substr(0, after[i].name.size() - 7);
        const bool linear = quantized.find(layer + ".W_q").first != nullptr;
        const Tensor expected = linear ? dequantize(load_quantized(quantized, layer), {dtype})
                                       : source.shard(s).read(before[i]);
        EXPECT_EQ(bytes_of(dense.shard(s).read(after[i])), bytes_of(expected)) << after[i].name;
      }
      EXPECT_EQ(dense.shard(s).metadata(), source.shard(s).metadata());
    }
    const auto index =
        nlohmann::json::parse(read_bytes(folder_ / "d/model.safetensors.index.json"));
    EXPECT_EQ(index["metadata"]["total_size"], dense.total_bytes());
  }
  // config.json as it was, no manifest: this is a plain checkpoint again.
  EXPECT_EQ(read_bytes(folder_ / "d/config.json"), read_bytes(folder_ / "m/config.json"));
  EXPECT_FALSE(fs::exists(folder_ / "d/hqq_cpp.manifest.json"));
  EXPECT_EQ(read_bytes(folder_ / "d/tokenizer.json"), read_bytes(folder_ / "m/tokenizer.json"));
  // It can be quantized again.
  EXPECT_EQ(quantize_checkpoint(folder_ / "d", folder_ / "again", {}).layers.size(), 12u);
}

TEST_F(Dense, DequantizeRefusals) {
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [&] { dequantize_checkpoint(folder_ / "q", folder_ / "d", DType::kI32); }),
              HasSubstr("dtype is int32; it must be float32"));
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [&] { dequantize_checkpoint(folder_ / "m", folder_ / "d", DType::kF32); }),
              HasSubstr("holds no layer that hqq_cpp has quantized"));
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [&] { dequantize_checkpoint(folder_ / "q", folder_ / "m", DType::kF32); }),
              HasSubstr("exists; use force"));
  CheckpointOptions options;
  options.threads = -2;
  EXPECT_THAT(message_of<std::invalid_argument>([&] {
                dequantize_checkpoint(folder_ / "q", folder_ / "d", DType::kF32, options);
              }),
              HasSubstr("threads is -2"));
  options.threads = 1;
  options.progress = [](const Progress&) { return false; };
  EXPECT_THROW(dequantize_checkpoint(folder_ / "q", folder_ / "d", DType::kF32, options),
               Interrupted);
  EXPECT_THAT(folder_.names(), ElementsAre("m", "q"));
  fs::create_directories(folder_ / "d.partial");
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [&] { dequantize_checkpoint(folder_ / "q", folder_ / "d", DType::kF32); }),
              HasSubstr("use force to start over"));
}

TEST_F(Dense, DiffOfQuantizedAndSource) {
  const std::vector<TensorDiff> diffs = diff_checkpoints(folder_ / "m", folder_ / "q");
  const Checkpoint quantized(folder_ / "q");
  ASSERT_EQ(diffs.size(), 26u);
  std::size_t layers = 0;
  for (const TensorDiff& diff : diffs) {
    EXPECT_EQ(diff.note, "") << diff.name;
    const std::string layer = diff.name.substr(0, diff.name.size() - 7);
    if (quantized.find(layer + ".W_q").first == nullptr) {
      EXPECT_TRUE(diff.identical) << diff.name;
      EXPECT_EQ(diff.relative, 0);
      continue;
    }
    ++layers;
    QuantizeStats stats;
    QuantizeOptions options;
    options.stats = &stats;
    const Tensor W = read_tensor(folder_ / "m", diff.name);
    Quantizer().quantize(TensorView(W), layer, options);
    EXPECT_FALSE(diff.identical);
    EXPECT_NEAR(diff.mean_abs, stats.mean_abs_error, 1e-6);
    EXPECT_NEAR(diff.rms, stats.rms_error, 1e-6);
    EXPECT_NEAR(diff.max_abs, stats.max_abs_error, 1e-6);
    EXPECT_NEAR(diff.relative, stats.relative_error, 1e-5);
  }
  EXPECT_EQ(layers, 12u);
}

TEST_F(Dense, DiffOfEqualFolders) {
  for (const char* other : {"q", "d"}) {
    if (std::string(other) == "d") {
      dequantize_checkpoint(folder_ / "q", folder_ / "d", DType::kF32);
    }
    for (const TensorDiff& diff : diff_checkpoints(folder_ / "q", folder_ / other)) {
      EXPECT_TRUE(diff.identical) << diff.name;
      EXPECT_EQ(diff.max_abs, 0);
    }
  }
}

TEST_F(Dense, DiffOfExperts) {
  const std::string name = "mlp.experts.down_proj";
  save_model(folder_ / "moe", {{{name, random_tensor(DType::kBF16, {7, 40, 72}, 1)}}});
  quantize_checkpoint(folder_ / "moe", folder_ / "moeq", {});
  dequantize_checkpoint(folder_ / "moeq", folder_ / "moed", DType::kF32);
  EXPECT_TRUE(diff_checkpoints(folder_ / "moed", folder_ / "moeq").at(0).identical);
  const TensorDiff diff = diff_checkpoints(folder_ / "moe", folder_ / "moeq").at(0);
  EXPECT_EQ(diff.name, name);
  EXPECT_GT(diff.relative, 0.01);
  EXPECT_LT(diff.relative, 0.2);
}

TEST(Diff, Values) {
  const TempFolder folder;
  const auto vector = [](std::vector<float> values) {
    Tensor tensor = Tensor::allocate(DType::kF32, {static_cast<std::int64_t>(values.size())});
    std::copy(values.begin(), values.end(), tensor.data<float>());
    return tensor;
  };
  Tensor integers = Tensor::allocate(DType::kI32, {2});
  integers.data<std::int32_t>()[0] = integers.data<std::int32_t>()[1] = 5;
  Tensor others = Tensor::allocate(DType::kI32, {2});
  others.data<std::int32_t>()[0] = 5;
  others.data<std::int32_t>()[1] = 4;
  const float kNaN = std::numeric_limits<float>::quiet_NaN();
  save_model_file(folder / "a.safetensors", {{"v", vector({3, 4, 0, 0})},
                                             {"only_a", vector({1})},
                                             {"shape", vector({1, 2})},
                                             {"int", integers},
                                             {"same_int", integers},
                                             {"type", integers},
                                             {"nan", vector({kNaN, 1})},
                                             {"new_nan", vector({1, 1})},
                                             {"empty", vector({})}});
  save_model_file(folder / "b.safetensors", {{"v", vector({3, 4, 1, -2})},
                                             {"only_b", vector({1})},
                                             {"shape", vector({1, 2, 3})},
                                             {"int", others},
                                             {"same_int", integers},
                                             {"type", vector({1, 2})},
                                             {"nan", vector({kNaN, 1})},
                                             {"new_nan", vector({1, kNaN})},
                                             {"empty", vector({})}});
  std::map<std::string, TensorDiff> diffs;
  for (const TensorDiff& diff :
       diff_checkpoints(folder / "a.safetensors", folder / "b.safetensors")) {
    diffs[diff.name] = diff;
  }
  EXPECT_EQ(diffs.size(), 10u);
  EXPECT_FALSE(diffs["v"].identical);
  EXPECT_DOUBLE_EQ(diffs["v"].mean_abs, 0.75);
  EXPECT_DOUBLE_EQ(diffs["v"].rms, std::sqrt(5.0 / 4));
  EXPECT_DOUBLE_EQ(diffs["v"].max_abs, 2);
  EXPECT_DOUBLE_EQ(diffs["v"].relative, std::sqrt(5.0) / 5);
  EXPECT_EQ(diffs["only_a"].note, "only in A");
  EXPECT_EQ(diffs["only_b"].note, "only in B");
  EXPECT_EQ(diffs["shape"].note, "shapes differ: [2], [3]");
  EXPECT_THAT(diffs["int"].note, HasSubstr("1 of 8 bytes differ"));
  EXPECT_FALSE(diffs["int"].identical);
  EXPECT_TRUE(diffs["same_int"].identical);
  EXPECT_THAT(diffs["type"].note, HasSubstr("types differ: int32, float32"));
  EXPECT_TRUE(diffs["nan"].identical);
  EXPECT_FALSE(diffs["new_nan"].identical);
  EXPECT_TRUE(std::isnan(diffs["new_nan"].max_abs));
  EXPECT_TRUE(diffs["empty"].identical);
  EXPECT_THROW(diff_checkpoints(folder / "a.safetensors", folder / "absent"), std::system_error);
}

TEST(Diff, FloatTypesCompareByValue) {
  const TempFolder folder;
  const Tensor brain = random_tensor(DType::kBF16, {1000, 300}, 1);
  Tensor wide = Tensor::allocate(DType::kF64, {1000, 300});
  std::vector<double> values(300000);
  read_values(DType::kBF16, brain.buffer.data, std::span(values));
  std::copy(values.begin(), values.end(), wide.data<double>());
  save_model_file(folder / "a.safetensors", {{"v", brain}});
  save_model_file(folder / "b.safetensors", {{"v", wide}});
  EXPECT_TRUE(diff_checkpoints(folder / "a.safetensors", folder / "b.safetensors").at(0).identical);
}

}  // namespace
}  // namespace hqq

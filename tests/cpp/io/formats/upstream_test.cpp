#include "src/io/formats/upstream.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "hqq/bitpack.hpp"
#include "hqq/error.hpp"
#include "hqq/safetensors.hpp"
#include "src/format/float_values.hpp"
#include "src/format/metadata.hpp"
#include "src/io/formats/upstream_pack.hpp"
#include "tests/cpp/io/formats/upstream_test_util.hpp"
#include "tests/cpp/support/message_of.hpp"

namespace hqq {
namespace {

using namespace hqq::testing;  // NOLINT
using ::testing::HasSubstr;

// ---- files written by hqq 0.2.8 (tests/golden/upstream) -----------------------------------------

class GoldenTest : public ::testing::Test {
 protected:
  const std::string folder = HQQ_SOURCE_DIR "/tests/golden/upstream/";
  const SafetensorsFile layers{folder + "layers.safetensors"};
  const SafetensorsFile codes{folder + "codes.safetensors"};

  Tensors layer(const std::string& name) const {
    Tensors tensors;
    for (const TensorInfo& info : layers.tensors()) {
      if (info.name.starts_with(name + ".")) {
        tensors[info.name.substr(name.size() + 1)] = layers.read(info);
      }
    }
    return tensors;
  }
};

TEST_F(GoldenTest, CodesOfEveryLayerAreThoseThatHqqUnpacks) {
  ASSERT_EQ(codes.tensors().size(), 23u);
  for (const TensorInfo& info : codes.tensors()) {
    const QuantizedTensor q = from_upstream(layer(info.name), info.name);
    const Tensor expected = codes.read(info);
    EXPECT_EQ((std::vector<std::int64_t>{q.out_features, q.in_features}), info.shape);
    const std::vector<std::uint8_t> got = codes_of(q);
    EXPECT_EQ(std::memcmp(got.data(), expected.buffer.data, got.size()), 0) << info.name;
  }
}

TEST_F(GoldenTest, EveryLayerComesBackByteForByte) {
  for (const TensorInfo& info : codes.tensors()) {
    const Tensors source = layer(info.name);
    const UpstreamLayer parsed = parse_upstream(source, info.name);
    Tensors back = as_map(to_upstream(from_upstream(source, info.name), info.name, parsed.options));
    if (source.contains("bias")) back["bias"] = source.at("bias");
    ASSERT_EQ(back.size(), source.size()) << info.name;
    for (const auto& [key, tensor] : source) {
      EXPECT_TRUE(same(tensor, back.at(key))) << info.name << "." << key;
    }
  }
}

TEST_F(GoldenTest, SettingsAreRead) {
  const UpstreamLayer columns = parse_upstream(layer("flat_columns"), "flat_columns");
  EXPECT_EQ(columns.config.nbits, BitWidth::k2);
  EXPECT_EQ(columns.config.axis, 0);
  EXPECT_EQ(columns.config.group_size, 32);
  EXPECT_EQ(columns.config.solver, Solver::kHqq);
  EXPECT_EQ(columns.config.round_zero, false);
  EXPECT_EQ(columns.config.meta_dtype, DType::kF16);
  EXPECT_FALSE(columns.options.view_as_float);
  const UpstreamLayer ternary = parse_upstream(layer("b1_58_axis0"), "b1_58_axis0");
  EXPECT_EQ(ternary.config.nbits, BitWidth::kTernary);
  // 20 is no multiple of 8: one group per row.
  EXPECT_EQ(parse_upstream(layer("fp32_rows"), "fp32_rows").config.group_size, std::nullopt);
  const UpstreamLayer view = parse_upstream(layer("float_view"), "float_view");
  EXPECT_TRUE(view.options.view_as_float);
  EXPECT_EQ(view.options.compute_dtype, DType::kBF16);
}

TEST_F(GoldenTest, OlderFilesLackTheQuantConfig) {
  Tensors old = layer("b4_axis1");
  const QuantizedTensor now = from_upstream(old, "fc");
  for (const char* key : {"stores_quant_config", "channel_wise", "optimize", "round_zero",
                          "unpack_view_dtype", "view_as_float", "packing", "compute_dtype"}) {
    old.erase(key);
  }
  const QuantizedTensor then = from_upstream(old, "fc");
  EXPECT_TRUE(same(now.W_q, then.W_q));
  EXPECT_EQ(then.config.round_zero, std::nullopt);
}

// ---- both ways
// -----------------------------------------------------------------------------------

TEST(UpstreamTest, WordsAreBuiltFromSlabsOfTheGrid) {
  for (const BitWidth width : kAllBitWidths) {
    for (const int axis : {0, 1}) {
      LayerConfig config;
      config.nbits = width;
      config.axis = axis;
      config.group_size = 24;
      const QuantizedTensor q = random_tensor(config, 48, 72, 5);
      const Tensor words = as_map(to_upstream(q, "fc")).at("W_q");
      const std::vector<std::uint8_t> codes = codes_of(q);
      // The grid, its rows filled up to whole slabs, and word (r, c) = sum of codes (k * step + r,
      // c).
      const UpstreamPacking& packing = upstream_packing(width);
      const std::int64_t rows = axis == 1 ? 144 : 24;
      const std::int64_t cols = 48 * 72 / rows;
      const std::int64_t step = (rows + packing.fields - 1) / packing.fields;
      ASSERT_EQ(words.shape, (std::vector<std::int64_t>{step, cols}));
      for (std::int64_t i = 0; i < step * cols; ++i) {
        std::uint32_t word = 0;
        for (int k = 0; k < packing.fields; ++k) {
          const std::int64_t row = k * step + i / cols;
          const std::uint32_t code =
              row < rows ? codes[static_cast<std::size_t>(row * cols + i % cols)] : 0;
          word = word << packing.bits | code;
        }
        const std::uint32_t got = words.dtype == DType::kI32 ? words.data<std::uint32_t>()[i]
                                                             : words.data<std::uint8_t>()[i];
        ASSERT_EQ(got, word) << nbits_of(width) << " bits, axis " << axis << ", word " << i;
      }
    }
  }
}

TEST(UpstreamTest, EveryWidthAxisAndTypeComesBack) {
  const std::vector<std::optional<std::int64_t>> group_sizes = {8, 16, 40, 64, std::nullopt};
  std::uint32_t seed = 0;
  for (const BitWidth width : kAllBitWidths) {
    for (const int axis : {0, 1}) {
      for (const auto group_size : group_sizes) {
        for (const DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
          LayerConfig config;
          config.nbits = width;
          config.axis = axis;
          config.group_size = group_size;
          config.meta_dtype = dtype;
          const QuantizedTensor q = random_tensor(config, 64, 320, ++seed);
          for (const bool view : {false, true}) {
            const UpstreamOptions options{std::nullopt, view};
            const Tensors tensors = as_map(to_upstream(q, "fc", options));
            const QuantizedTensor back = from_upstream(tensors, "fc");
            EXPECT_TRUE(same(q.W_q, back.W_q));
            EXPECT_TRUE(same(q.scale, back.scale));
            EXPECT_TRUE(same(q.zero, back.zero));
            EXPECT_EQ(back.config.nbits, width);
            EXPECT_EQ(parse_upstream(tensors, "fc").options.view_as_float, view);
          }
        }
      }
    }
  }
}

TEST(UpstreamTest, LayoutIsWhatIsWritten) {
  for (const BitWidth width : kAllBitWidths) {
    LayerConfig config;
    config.nbits = width;
    config.quant_scale = width == BitWidth::k3;
    const QuantizedTensor q = random_tensor(config, 16, 128, 3);
    const UpstreamOptions options{DType::kF32, width == BitWidth::k4};
    const auto tensors = to_upstream(q, "fc", options);
    const auto layout = upstream_layout(q.config, 16, 128, "fc", options);
    ASSERT_EQ(layout.size(), tensors.size());
    for (std::size_t i = 0; i < layout.size(); ++i) {
      EXPECT_EQ(layout[i].first, tensors[i].first);
      EXPECT_EQ(layout[i].second.dtype, tensors[i].second.dtype);
      EXPECT_EQ(layout[i].second.shape, tensors[i].second.shape);
      EXPECT_TRUE(tensors[i].second) << tensors[i].first;
    }
  }
}

TEST(UpstreamTest, GroupsLongerThanTheRowAreTheRow) {
  LayerConfig config;
  config.group_size = 64;
  const QuantizedTensor q = random_tensor(config, 8, 20, 2);
  const QuantizedTensor back = from_upstream(as_map(to_upstream(q, "fc")), "fc");
  EXPECT_EQ(back.config.group_size, std::nullopt);
  EXPECT_TRUE(same(q.W_q, back.W_q));
  EXPECT_TRUE(same(q.scale, back.scale));
}

TEST(UpstreamTest, EightBitMetadataBecomesFloat32) {
  LayerConfig config;
  config.group_size = 16;
  config.quant_scale = true;
  config.quant_zero = true;
  // 320 groups: more than two blocks of 128.
  const QuantizedTensor q = random_tensor(config, 16, 320, 9);
  const Tensors tensors = as_map(to_upstream(q, "fc"));
  const Tensor dtype = tensors.at("compute_dtype");
  EXPECT_EQ(std::string(dtype.data<char>(), dtype.nbytes()), "torch.float32");
  const QuantizedTensor back = from_upstream(tensors, "fc");
  EXPECT_EQ(back.config.meta_dtype, DType::kF32);
  EXPECT_EQ(read_values(back.scale), read_scale(q));
  EXPECT_EQ(read_values(back.zero), read_zero(q));
  EXPECT_TRUE(same(q.W_q, back.W_q));
}

TEST(UpstreamTest, StackedZeroAndScaleOfOffloadedMetadata) {
  Tensors tensors = valid_layer();
  const QuantizedTensor q = from_upstream(tensors, "fc");
  std::vector<std::int64_t> shape = tensors.at("scale").shape;
  shape.insert(shape.begin(), 2);
  Tensor stacked = Tensor::allocate(q.config.meta_dtype, shape);
  std::memcpy(stacked.buffer.data, q.zero.buffer.data, q.zero.nbytes());
  std::memcpy(stacked.buffer.data + q.zero.nbytes(), q.scale.buffer.data, q.scale.nbytes());
  tensors.erase("scale");
  tensors.erase("zero");
  tensors["zero_scale"] = stacked;
  tensors["offload_meta"] = make_flag(1);
  const QuantizedTensor back = from_upstream(tensors, "fc");
  EXPECT_TRUE(same(q.scale, back.scale));
  EXPECT_TRUE(same(q.zero, back.zero));
  tensors["zero_scale"].shape[0] = 1;
  EXPECT_THAT(message_of<FormatError>([&] { from_upstream(tensors, "fc"); }),
              HasSubstr("zero_scale is F16 [1, 16, 1]; it must be F16, BF16 or F32 [2, 16, 1]"));
}

TEST(UpstreamTest, TernaryLayersThatHqqSavedAgainSayOneBit) {
  LayerConfig config;
  config.nbits = BitWidth::kTernary;
  const QuantizedTensor q = random_tensor(config, 16, 64, 4);
  Tensors tensors = as_map(to_upstream(q, "fc"));
  tensors["nbits"] = make_int(1);
  EXPECT_TRUE(same(from_upstream(tensors, "fc").W_q, q.W_q));
}

// ---- what upstream cannot hold
// -------------------------------------------------------------------

struct Unrepresentable {
  const char* what;
  std::function<void(LayerConfig&)> change;
  std::int64_t out, in;
  const char* message;
};

TEST(UpstreamTest, LayersThatHqqCannotHoldAreRefused) {
  const std::vector<Unrepresentable> cases = {
      {"column scale", [](LayerConfig& c) { c.balance = Balance::kSinkhorn; }, 8, 64,
       "hqq has no place for col_scale; quantize with balance none"},
      {"tail in a row", [](LayerConfig&) {}, 8, 100,
       "group_size 64 must divide 100 (W is [8, 100], axis 1)"},
      {"tail across columns", [](LayerConfig& c) { c.axis = 0; }, 10, 10,
       "group_size 64 must divide 100 (W is [10, 10], axis 0)"},
      {"odd number of groups", [](LayerConfig&) {}, 3, 64,
       "hqq packs 4bit_u8 in 2 equal parts, but the 3 groups do not divide by it"},
      {"groups for eight slabs", [](LayerConfig& c) { c.nbits = BitWidth::k1; }, 6, 128,
       "hqq packs 1bit_u8 in 8 equal parts, but the 12 groups do not divide by it"},
      {"odd columns", [](LayerConfig& c) { c.axis = 0, c.group_size.reset(); }, 7, 64,
       "hqq packs 4bit_u8 in 2 equal parts, but the 7 weights of a group do not divide by it"},
  };
  for (const Unrepresentable& one : cases) {
    LayerConfig config;
    config.balance = Balance::kNone;
    one.change(config);
    EXPECT_THAT(message_of([&] { check_upstream_holds(config, one.out, one.in, "fc"); }),
                HasSubstr(one.message))
        << one.what;
  }
}

TEST(UpstreamTest, OptionsAreChecked) {
  LayerConfig config;
  config.group_size.reset();
  const QuantizedTensor q = random_tensor(config, 8, 25, 1);
  EXPECT_THAT(message_of([&] { to_upstream(q, "fc", {DType::kI32, false}); }),
              HasSubstr("compute_dtype is int32; it must be float16, bfloat16 or float32"));
  EXPECT_THAT(message_of([&] { to_upstream(q, "fc", {DType::kF16, true}); }),
              HasSubstr("rows of W_q have 25 bytes, which are not whole float16 values"));
}

}  // namespace
}  // namespace hqq

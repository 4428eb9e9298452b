#include "src/io/formats/upstream.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "hqq/bitpack.hpp"
#include "hqq/error.hpp"
#include "hqq/safetensors.hpp"
#include "src/format/float_values.hpp"
#include "src/format/metadata.hpp"
#include "src/io/formats/upstream_pack.hpp"

namespace hqq {
namespace {

using ::testing::HasSubstr;
using Tensors = std::map<std::string, Tensor>;

bool same(const Tensor& a, const Tensor& b) {
  return a.dtype == b.dtype && a.shape == b.shape && a.nbytes() == b.nbytes() &&
         std::memcmp(a.buffer.data, b.buffer.data, a.nbytes()) == 0;
}

Tensor copy_of(const Tensor& tensor) {
  Tensor copy = Tensor::allocate(tensor.dtype, tensor.shape);
  std::memcpy(copy.buffer.data, tensor.buffer.data, tensor.nbytes());
  return copy;
}

template <class T>
Tensor make(DType dtype, std::vector<std::int64_t> shape, std::vector<T> values) {
  Tensor tensor = Tensor::allocate(dtype, std::move(shape));
  EXPECT_EQ(tensor.nbytes(), values.size() * sizeof(T));
  std::memcpy(tensor.buffer.data, values.data(), tensor.nbytes());
  return tensor;
}
Tensor make_int(std::int32_t value) { return make<std::int32_t>(DType::kI32, {}, {value}); }
Tensor make_flag(std::uint8_t value) { return make<std::uint8_t>(DType::kU8, {}, {value}); }
Tensor make_text(const std::string& text) {
  return make<char>(DType::kU8, {static_cast<std::int64_t>(text.size())},
                    {text.begin(), text.end()});
}
Tensor make_shape(std::int64_t rows, std::int64_t cols) {
  return make<std::int64_t>(DType::kI64, {2}, {rows, cols});
}

std::vector<std::uint8_t> codes_of(const QuantizedTensor& q) {
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(q.out_features * q.in_features));
  const auto bytes = static_cast<std::size_t>(q.W_q.shape[1]);
  const auto cols = static_cast<std::size_t>(q.in_features);
  for (std::size_t row = 0; row < static_cast<std::size_t>(q.out_features); ++row) {
    unpack_row(q.config.nbits, {q.W_q.data<std::uint8_t>() + row * bytes, bytes},
               std::span(codes).subspan(row * cols, cols));
  }
  return codes;
}

// Random codes, and random finite scales and zeros of any bit pattern.
QuantizedTensor random_tensor(const LayerConfig& config, std::int64_t out, std::int64_t in,
                              std::uint32_t seed) {
  std::mt19937 random(seed);
  QuantizedTensor q;
  q.config = config;
  q.config.balance = Balance::kNone;
  q.out_features = out;
  q.in_features = in;
  q.allocate();
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(in));
  for (std::int64_t row = 0; row < out; ++row) {
    for (auto& code : codes) {
      code = static_cast<std::uint8_t>(random() % (max_code(config.nbits) + 1));
    }
    const auto bytes = static_cast<std::size_t>(q.W_q.shape[1]);
    pack_row(config.nbits, codes,
             {q.W_q.data<std::uint8_t>() + static_cast<std::size_t>(row) * bytes, bytes});
  }
  for (auto& [name, tensor] : q.fields()) {
    if (name == "W_q" || !*tensor) continue;
    if (tensor->dtype == DType::kU8) {
      for (std::size_t i = 0; i < tensor->nbytes(); ++i) {
        tensor->data<std::uint8_t>()[i] = static_cast<std::uint8_t>(random());
      }
      continue;
    }
    std::vector<float> values(static_cast<std::size_t>(tensor->numel()));
    for (float& value : values) value = static_cast<float>(random() % 4001) / 1000.0f - 2.0f;
    write_values(values, tensor->dtype, tensor->buffer.data);
  }
  return q;
}

Tensors as_map(const std::vector<std::pair<std::string, Tensor>>& tensors) {
  return {tensors.begin(), tensors.end()};
}

// A small valid layer: 4 bits, axis 1, [8, 32], groups of 16.
Tensors valid_layer() {
  LayerConfig config;
  config.group_size = 16;
  return as_map(to_upstream(random_tensor(config, 8, 32, 1), "fc"));
}

template <class Error = std::invalid_argument>
std::string message_of(const std::function<void()>& function) {
  try {
    function();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing was thrown";
}

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

// ---- hostile files
// -------------------------------------------------------------------------------

struct Damage {
  const char* key;
  Tensor value;  // absent: the key is removed
  const char* message;
};

TEST(UpstreamTest, DamagedLayersAreRefused) {
  const std::int64_t huge = std::int64_t{1} << 62;
  const std::vector<Damage> cases = {
      {"W_q", {}, "tensor W_q is missing"},
      {"scale", {}, "tensor scale is missing"},
      {"zero", {}, "tensor zero is missing"},
      {"shape", {}, "tensor shape is missing"},
      {"nbits", {}, "tensor nbits is missing"},
      {"axis", {}, "tensor axis is missing"},
      {"shape", make_shape(-8, 32), "shape is [-8, 32]; both sizes must be positive"},
      {"shape", make_shape(0, 32), "shape is [0, 32]; both sizes must be positive"},
      {"shape", make_shape(huge, huge), "with at most 2^56 weights"},
      {"shape", make_shape(std::numeric_limits<std::int64_t>::min(), -1), "must be positive"},
      {"shape", make_shape(16, 32),
       "W_q is U8 [8, 16]; the other tensors of the layer need U8 [16, 16]"},
      {"shape", make<std::int64_t>(DType::kI64, {3}, {8, 32, 1}),
       "shape is I64 [3]; it must be I64 [2]"},
      {"shape", make<std::int32_t>(DType::kI32, {2}, {8, 32}),
       "shape is I32 [2]; it must be I64 [2]"},
      {"nbits", make_int(1000000), "nbits must be one of 8, 6, 5, 4, 3, 2, 1.58, 1"},
      {"nbits", make_int(-4), "nbits must be one of"},
      {"nbits", make<float>(DType::kF32, {}, {NAN}), "nbits must be one of"},
      {"nbits", make<float>(DType::kF32, {2}, {4, 4}), "nbits is F32 [2]; it must be one number"},
      {"nbits", make_int(3),
       "packing is 4bit_u8, which does not go with nbits; it must be 3bit_32"},
      {"nbits", make_text("4x"), "nbits is U8 [2]; it must be one number"},
      {"group_size", make_int(0), "group_size is 0; it must divide the 256 weights"},
      {"group_size", make_int(-16), "group_size is -16; it must divide"},
      {"group_size", make_int(48), "group_size is 48; it must divide"},
      {"group_size", make_int(64), "groups of 64 weights run over the ends of rows of 32"},
      {"group_size", make_int(4), "group_size is 4; format 1 needs a multiple of 8, or 32"},
      {"group_size", make_int(8),
       "W_q is U8 [8, 16]; the other tensors of the layer need U8 [16, 8]"},
      {"group_size", make<float>(DType::kF32, {}, {INFINITY}), "group_size must be an integer"},
      {"group_size", make<float>(DType::kF32, {}, {16.5f}), "group_size must be an integer"},
      {"axis", make_int(2), "axis is 2; it must be 0 or 1"},
      {"axis", make_int(-1), "axis is -1; it must be 0 or 1"},
      {"packing", make_text("5bit_u8"), "there is no packing \"5bit_u8\""},
      {"packing", make_text(std::string(100, 'x')), "packing is U8 [100]"},
      {"packing", make_int(4), "packing is I32 []; it must be U8 [n]"},
      {"packing", make_text("8bit_u8"), "packing is 8bit_u8, which does not go with nbits"},
      {"unpack_view_dtype", make_text("torch.int32"), "it must be torch.uint8"},
      {"compute_dtype", make_text("torch.int8"), "compute_dtype is \"torch.int8\""},
      {"compute_dtype", make_text("__import__('os')"), "compute_dtype is \"__import__('os')\""},
      {"view_as_float", make_flag(1), "with view_as_float it must be F16, BF16 or F32"},
      {"view_as_float", make_flag(2), "view_as_float must be U8 [] with the value 0 or 1"},
      {"quant_zero", make_flag(1), "quant_scale or quant_zero is true"},
      {"quant_scale", make_flag(1), "quant_scale or quant_zero is true"},
      {"channel_wise", make_flag(0), "channel_wise is false"},
      {"encoded_state_dict", make_flag(0), "encoded_state_dict is 0"},
      {"optimize", make_text("ab"), "optimize must be U8 []"},
      {"W_q", make<std::int32_t>(DType::kI32, {8, 4}, std::vector<std::int32_t>(32)),
       "W_q is I32 [8, 4]"},
      {"scale", make<std::uint16_t>(DType::kF16, {1, 16}, std::vector<std::uint16_t>(16)),
       "scale is F16 [1, 16]; it must be F16, BF16 or F32 [16, 1]"},
      {"zero", make<std::uint16_t>(DType::kF16, {15, 1}, std::vector<std::uint16_t>(15)),
       "zero is F16 [15, 1]"},
      {"zero", make<std::uint16_t>(DType::kBF16, {16, 1}, std::vector<std::uint16_t>(16)),
       "scale and zero must have the same type"},
      {"scale", make<std::uint8_t>(DType::kU8, {16, 1}, std::vector<std::uint8_t>(16)),
       "scale is U8 [16, 1]"},
      {"col_scale", make<float>(DType::kF32, {32}, std::vector<float>(32)),
       "hqq has no tensor \"col_scale\""},
  };
  ASSERT_NO_THROW(from_upstream(valid_layer(), "fc"));
  for (const Damage& damage : cases) {
    Tensors tensors = valid_layer();
    if (damage.value) {
      tensors[damage.key] = damage.value;
    } else {
      tensors.erase(damage.key);
    }
    const std::string message = message_of([&] { from_upstream(tensors, "fc"); });
    EXPECT_THAT(message, HasSubstr(damage.message)) << damage.key;
    EXPECT_THAT(message, ::testing::StartsWith("[upstream, layer \"fc\"] "));
  }
}

TEST(UpstreamTest, CodesAndBitsThatMeanNothingAreRefused) {
  LayerConfig config;
  config.group_size = 8;
  for (const auto& [width, bad] : std::vector<std::pair<BitWidth, std::uint8_t>>{
           {BitWidth::k6, 64}, {BitWidth::k5, 32}, {BitWidth::kTernary, 3}}) {
    config.nbits = width;
    Tensors tensors = as_map(to_upstream(random_tensor(config, 4, 16, 1), "fc"));
    tensors["W_q"] = copy_of(tensors["W_q"]);
    tensors["W_q"].data<std::uint8_t>()[1] = bad;
    EXPECT_THAT(message_of<FormatError>([&] { from_upstream(tensors, "fc"); }),
                HasSubstr("W_q has the code " + std::to_string(bad) + " for the weight ["));
  }
  // 13 groups in ten fields: the second word has fields left over, every word two bits.
  config.nbits = BitWidth::k3;
  Tensors tensors = as_map(to_upstream(random_tensor(config, 1, 104, 1), "fc"));
  ASSERT_EQ(tensors["W_q"].shape, (std::vector<std::int64_t>{2, 8}));
  for (const auto& [word, bit] : {std::pair{8, 0}, {15, 8}, {0, 30}, {3, 31}}) {
    Tensors damaged = tensors;
    damaged["W_q"] = copy_of(tensors["W_q"]);
    damaged["W_q"].data<std::uint32_t>()[word] |= 1u << bit;
    EXPECT_THAT(message_of<FormatError>([&] { from_upstream(damaged, "fc"); }),
                HasSubstr("word " + std::to_string(word) + " of W_q has bits set"));
  }
}

TEST(UpstreamTest, RandomDamageIsReadOrRefused) {
  std::mt19937 random(11);
  int refused = 0;
  for (int round = 0; round < 4000; ++round) {
    LayerConfig config;
    config.nbits = kAllBitWidths[random() % std::size(kAllBitWidths)];
    config.axis = static_cast<int>(random() % 2);
    config.group_size = 16;
    Tensors tensors = as_map(to_upstream(random_tensor(config, 16, 32, round), "fc"));
    for (int change = 0; change < 2; ++change) {
      auto victim = std::next(tensors.begin(), static_cast<int>(random() % tensors.size()));
      Tensor tensor = copy_of(victim->second);
      const std::size_t bytes = tensor.nbytes();
      if (random() % 2 == 0 && bytes > 0) {
        tensor.buffer.data[random() % bytes] ^= static_cast<std::byte>(1u << random() % 8);
      } else if (!tensor.shape.empty()) {
        // Another shape of as many bytes: a file cannot say anything else.
        tensor.shape = {static_cast<std::int64_t>(bytes / dtype_size(tensor.dtype))};
      } else {
        tensor = Tensor::allocate(DType::kU8, {0});
      }
      victim->second = tensor;
    }
    try {
      from_upstream(tensors, "fc").validate("fc");
    } catch (const std::invalid_argument&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 1000);
}

}  // namespace
}  // namespace hqq

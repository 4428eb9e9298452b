// Upstream's tensors that are damaged: each is refused in one sentence.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "hqq/error.hpp"
#include "src/io/formats/upstream.hpp"
#include "tests/cpp/io/formats/upstream_test_util.hpp"
#include "tests/cpp/support/message_of.hpp"

namespace hqq {
namespace {

using namespace hqq::testing;  // NOLINT
using ::testing::HasSubstr;

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

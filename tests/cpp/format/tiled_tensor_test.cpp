// hqq::TiledTensor: there and back bit for bit, the same W_r, and what is refused.
#include "hqq/tiled_tensor.hpp"

#include <gmock/gmock.h>

#include <numeric>

#include "hqq/eigen.hpp"
#include "hqq/error.hpp"
#include "hqq/quantizer.hpp"
#include "tests/cpp/support/linear_test_util.hpp"

namespace hqq {
namespace {

using namespace hqq::testing;  // NOLINT
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

template <class Weight>
std::vector<std::byte> bytes_of(const Weight& q) {
  std::vector<std::byte> all;
  for (const auto& [name, tensor] : q.tensors()) {
    all.insert(all.end(), tensor->buffer.data, tensor->buffer.data + tensor->buffer.size);
  }
  return all;
}

// Layers of every width, axis and type of metadata, with tiles that are full and not.
std::vector<LayerSpec> tiled_layers() {
  std::vector<LayerSpec> all;
  for (BitWidth nbits : kAllBitWidths) {
    for (DType meta : {DType::kF16, DType::kBF16, DType::kF32}) {
      for (std::int64_t out : {1, 15, 16, 33, 257}) {
        for (std::optional<std::int64_t> group :
             {std::optional<std::int64_t>(8), std::optional<std::int64_t>(64),
              std::optional<std::int64_t>()}) {
          const std::size_t i = all.size();
          all.push_back({nbits, 1, group, out, 32 + static_cast<std::int64_t>(i * 7 % 131), meta,
                         i % 3 == 0, i % 4 == 0, i % 2 == 0});
        }
      }
      for (std::int64_t group : {16, 48}) {
        for (std::int64_t times : {1, 3}) {
          const std::size_t i = all.size();
          all.push_back({nbits, 0, group, group * times,
                         32 + static_cast<std::int64_t>(i * 7 % 131), meta, i % 3 == 0, i % 4 == 0,
                         i % 2 == 0});
        }
      }
    }
    all.push_back({nbits, 0, std::nullopt, 32, 4160});
  }
  return all;
}

TEST(TiledTensorTest, ThereAndBackIsBitForBit) {
  Rng rng(1);
  for (const LayerSpec& spec : tiled_layers()) {
    SCOPED_TRACE(::testing::Message() << spec);
    const QuantizedTensor q = random_layer(spec, rng);
    const TiledTensor tiled = tile(q);
    tiled.validate("x");
    const QuantizedTensor back = untile(tiled, {3});
    back.validate("x");
    ASSERT_EQ(back.config, q.config);
    ASSERT_EQ(bytes_of(back), bytes_of(q));
    // Threads change nothing, nor does giving the matrix away.
    for (int threads : {1, 5}) {
      QuantizedTensor copy = q;
      ASSERT_EQ(bytes_of(tile(std::move(copy), {threads})), bytes_of(tiled));
      ASSERT_EQ(bytes_of(untile(tiled, {threads})), bytes_of(q));
    }
  }
}

// Where a code is, from the words of docs/kernels.md: byte 4 r + j of field f is column 4 f + j of
// row r, and with 8 bits a field is a vector.
TEST(TiledTensorTest, EightBitCodesLieAsDocumented) {
  Rng rng(2);
  const LayerSpec spec{.nbits = BitWidth::k8, .out_features = 21, .in_features = 77};
  const QuantizedTensor q = random_layer(spec, rng);
  const TiledTensor tiled = tile(q);
  ASSERT_EQ(tiled.W_q.shape, (std::vector<std::int64_t>{2, 3, 512}));
  ASSERT_EQ(tiled.scale.shape, (std::vector<std::int64_t>{2, 2, 16}));
  for (std::int64_t n = 0; n < 32; ++n) {
    for (std::int64_t k = 0; k < 96; ++k) {
      const std::int64_t at = ((n / 16 * 3 + k / 32) * 8 + k % 32 / 4) * 64 + n % 16 * 4 + k % 4;
      const int expected = n < 21 && k < 77 ? q.W_q.data<std::uint8_t>()[n * 77 + k] : 0;
      ASSERT_EQ(tiled.W_q.data<std::uint8_t>()[at], expected) << n << ", " << k;
    }
  }
}

TEST(TiledTensorTest, TheBitsAreThoseOfFormat1) {
  Rng rng(3);
  for (BitWidth nbits : kAllBitWidths) {
    LayerSpec spec{.nbits = nbits, .out_features = 64, .in_features = 640};
    const QuantizedTensor q = random_layer(spec, rng);
    const auto bits = nbits == BitWidth::kTernary ? 2 : static_cast<std::int64_t>(nbits_of(nbits));
    EXPECT_EQ(tile(q).W_q.nbytes(), static_cast<std::size_t>(64 * 640 * bits / 8));
    if (nbits != BitWidth::kTernary) {
      EXPECT_EQ(tile(q).nbytes(), q.nbytes());
    }
  }
}

TEST(TiledTensorTest, GivingTheMatrixAwayFreesIt) {
  Rng rng(4);
  QuantizedTensor q = random_layer({.out_features = 16, .in_features = 64}, rng);
  const std::weak_ptr<void> codes = q.W_q.buffer.owner;
  const TiledTensor tiled = tile(std::move(q));
  EXPECT_TRUE(codes.expired());
  const TiledTensor copy = tiled;  // shares memory, as tensors do
  EXPECT_EQ(copy.W_q.buffer.data, tiled.W_q.buffer.data);
}

TEST(TiledTensorTest, DequantizesToTheSameMatrix) {
  Rng rng(5);
  const TargetGuard target_guard;
  for (const std::string& target : cpu::supported_targets()) {
    cpu::set_target(target);
    std::size_t i = 0;
    for (const LayerSpec& spec : tiled_layers()) {
      if (++i % 3 != 0) continue;
      SCOPED_TRACE(::testing::Message() << target << ", " << spec);
      const QuantizedTensor q = random_layer(spec, rng);
      const TiledTensor tiled = tile(q);
      const DType dtype = one_of(rng, {DType::kF32, DType::kF16, DType::kBF16, DType::kF64});
      const Tensor expected = dequantize(q, {dtype});
      Tensor dense = Tensor::allocate(dtype, expected.shape);
      dequantize(tiled, dense.buffer.data, {dtype, 2});
      ASSERT_EQ(std::memcmp(dense.buffer.data, expected.buffer.data, expected.nbytes()), 0);

      // Rows in any order, some of them twice.
      std::vector<std::int64_t> rows;
      for (int r = 0; r < 9; ++r) rows.push_back(uniform(rng, 0, q.out_features - 1));
      rows.push_back(rows.front());
      const std::size_t row_bytes = expected.nbytes() / static_cast<std::size_t>(q.out_features);
      const auto some = guarded_memory(rows.size() * row_bytes, Guard::kAfter);
      const auto check = [&](const auto& weight) {
        std::memset(some.get(), 0x5A, rows.size() * row_bytes);
        dequantize_rows(weight, rows, some.get(), {dtype});
        for (std::size_t r = 0; r < rows.size(); ++r) {
          ASSERT_EQ(
              std::memcmp(some.get() + r * row_bytes,
                          expected.buffer.data + static_cast<std::size_t>(rows[r]) * row_bytes,
                          row_bytes),
              0)
              << "row " << rows[r];
        }
      };
      check(tiled);
      check(q);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(TiledTensorTest, RowsOfALayerWithoutTiles) {
  Rng rng(6);
  const LayerSpec spec{.axis = 0, .group_size = 24, .out_features = 25, .in_features = 40};
  const QuantizedTensor q = random_layer(spec, rng);
  const RowMajorMatrix dense = dequantize_matrix(q);
  const std::vector<std::int64_t> rows = {24, 0, 7};
  RowMajorMatrix some(3, 40);
  dequantize_rows(q, rows, some.data());
  for (Eigen::Index r = 0; r < 3; ++r) EXPECT_EQ(some.row(r), dense.row(rows[std::size_t(r)]));
}

TEST(TiledTensorTest, NoRowsAreNoRows) {
  Rng rng(7);
  const QuantizedTensor q = random_layer({.out_features = 16, .in_features = 64}, rng);
  dequantize_rows(q, {}, nullptr);
  dequantize_rows(tile(q), {}, nullptr);
}

TEST(TiledTensorTest, WhichLayersHaveTiles) {
  const auto can = [](int axis, std::optional<std::int64_t> group, std::int64_t out) {
    LayerConfig config;
    config.axis = axis;
    config.group_size = group;
    return can_tile(config, out, 40);
  };
  EXPECT_TRUE(can(1, 8, 1));
  EXPECT_TRUE(can(1, std::nullopt, 257));
  EXPECT_TRUE(can(0, 16, 48));
  EXPECT_TRUE(can(0, std::nullopt, 32));
  EXPECT_FALSE(can(0, 8, 48));
  EXPECT_FALSE(can(0, 24, 48));
  EXPECT_FALSE(can(0, 16, 40));
  EXPECT_FALSE(can(0, std::nullopt, 40));
  EXPECT_FALSE(can(1, 8, 0));
}

TEST(TiledTensorTest, ALayerWithoutTilesIsRefused) {
  Rng rng(8);
  const LayerSpec spec{.axis = 0, .group_size = 24, .out_features = 48, .in_features = 40};
  EXPECT_THAT([&] { tile(random_layer(spec, rng)); },
              ThrowsMessage<std::invalid_argument>(
                  HasSubstr("group_size is a multiple of 16 that divides")));
  TiledTensor tiled;
  tiled.config = random_layer(spec, rng).config;
  tiled.out_features = 48;
  tiled.in_features = 40;
  EXPECT_THAT([&] { tiled.validate("x"); },
              ThrowsMessage<FormatError>(HasSubstr("group_size 24, axis 0")));
  EXPECT_THROW(TiledTensor().validate("x"), FormatError);
}

TEST(TiledTensorTest, RowsOutsideTheMatrixAreRefused) {
  Rng rng(9);
  const QuantizedTensor q = random_layer({.out_features = 17, .in_features = 64}, rng);
  const TiledTensor tiled = tile(q);
  std::vector<float> out(64);
  for (std::int64_t row : {std::int64_t{-1}, std::int64_t{17}, std::int64_t{1} << 40}) {
    const std::vector<std::int64_t> rows = {row};
    const auto says = ThrowsMessage<std::invalid_argument>(
        HasSubstr("row " + std::to_string(row) + " does not exist; W has 17 rows"));
    EXPECT_THAT([&] { dequantize_rows(tiled, rows, out.data()); }, says);
    EXPECT_THAT([&] { dequantize_rows(q, rows, out.data()); }, says);
  }
  const std::vector<std::int64_t> rows = {0};
  const auto says = ThrowsMessage<std::invalid_argument>(HasSubstr("int8 is not float32"));
  EXPECT_THAT([&] { dequantize_rows(tiled, rows, out.data(), {DType::kI8}); }, says);
  EXPECT_THAT([&] { dequantize(tiled, out.data(), {DType::kI8}); }, says);
}

TEST(TiledTensorTest, ValidateNamesTheTensorThatDoesNotFit) {
  Rng rng(10);
  const TiledTensor good = tile(random_layer(
      {.out_features = 17, .in_features = 80, .quant_zero = true, .col_scale = true}, rng));
  good.validate("x");
  const auto refused = [&](auto change, const std::string& message) {
    TiledTensor wrong = good;
    change(wrong);
    EXPECT_THAT([&] { wrong.validate("x"); }, ThrowsMessage<FormatError>(HasSubstr(message)));
  };
  refused([](TiledTensor& t) { t.W_q.shape = {3, 2, 256}; },
          "the tiled W_q is uint8 [3, 2, 256]; it must be uint8 [2, 3, 256]");
  refused([](TiledTensor& t) { t.W_q.dtype = DType::kI8; }, "the tiled W_q is int8");
  refused([](TiledTensor& t) { t.W_q = Tensor(); }, "the tiled W_q is missing");
  refused([](TiledTensor& t) { t.scale.shape = {17, 2}; },
          "the tiled scale is float16 [17, 2]; it must be float16 [2, 2, 16]");
  refused([](TiledTensor& t) { t.zero.dtype = DType::kF16; },
          "the tiled zero is float16 [2, 2, 16]; it must be uint8 [2, 2, 16]");
  refused([](TiledTensor& t) { t.zero_step = Tensor(); }, "the tiled zero_step is missing");
  refused([](TiledTensor& t) { t.scale_step = t.zero_step; },
          "the tiled scale_step is present, but the settings exclude it");
  refused([](TiledTensor& t) { t.col_scale.shape = {79}; }, "the tiled col_scale is");
  refused([](TiledTensor& t) { t.config.balance = Balance::kNone; },
          "the tiled col_scale is present");
  refused([](TiledTensor& t) { t.W_q.buffer.size -= 1; },
          "the tiled W_q has 1535 bytes; its shape [2, 3, 256] needs 1536");
  refused([](TiledTensor& t) { t.out_features = 33; }, "it must be uint8 [3, 3, 256]");
  refused([](TiledTensor& t) { t.out_features = -1; }, "no tiles have this shape: W is [-1, 80]");
  refused([](TiledTensor& t) { t.in_features = 0; }, "no tiles have this shape: W is [17, 0]");
  TiledTensor wrong = good;
  wrong.zero = Tensor();
  EXPECT_THROW(untile(wrong), FormatError);
  EXPECT_THROW(dequantize_rows(wrong, {}, nullptr), FormatError);
}

TEST(TiledTensorTest, FieldsAreNamedAsInFormat1) {
  Rng rng(11);
  const QuantizedTensor q = random_layer(
      {.out_features = 17, .in_features = 80, .quant_scale = true, .col_scale = true}, rng);
  TiledTensor tiled = tile(q);
  const auto names = [](const auto& list) {
    std::vector<std::string> all;
    for (const auto& [name, tensor] : list) all.push_back(name);
    return all;
  };
  EXPECT_EQ(names(tiled.tensors()), names(q.tensors()));
  TiledTensor empty;
  empty.config = tiled.config;
  empty.out_features = 17;
  empty.in_features = 80;
  empty.allocate();
  empty.validate("x");
  EXPECT_EQ(names(empty.tensors()), names(tiled.tensors()));
}

}  // namespace
}  // namespace hqq

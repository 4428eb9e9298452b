// Codes from format 1 to tiles and back.
#include "cuda/pack.hpp"

#include <gtest/gtest.h>

#include "cuda/dequantize.hpp"
#include "hqq/core/codec.hpp"
#include "tests/cuda/linear_test_util.hpp"

namespace hqq::cuda {
namespace {

// A matrix with its codes in tiles.
class Tiles {
 public:
  explicit Tiles(const DeviceMatrix& format1) : codes_(tiles_bytes(format1)), matrix_(format1) {
    pack(format1, codes_.data(), nullptr);
    matrix_.packing = Packing::kCudaTiles;
    matrix_.W_q = codes_.data();
    matrix_.row_bytes = 0;
  }
  const DeviceMatrix& matrix() const { return matrix_; }

 private:
  DeviceArray<std::uint8_t> codes_;
  DeviceMatrix matrix_;
};

// The layout of docs/cuda-kernels.md, code by code.
TEST(Pack, PutsEveryCodeInItsPlace) {
  Rng rng(3);
  for (BitWidth width : kAllBitWidths) {
    SCOPED_TRACE(nbits_of(width));
    const QuantizedTensor q = random_layer(shape(width, 1, 64, 45, 100), rng);
    const DenseLayer dense(q);
    const DeviceCopy copy(q);
    const DeviceArray<std::byte> codes(tiles_bytes(copy.matrix()));
    pack(copy.matrix(), codes.data(), nullptr);
    const int low = width == BitWidth::kTernary ? 2 : core::row_format(width).low_bits;
    const int high = core::row_format(width).high_bits;
    ASSERT_EQ(codes.size(), static_cast<std::size_t>(2 * 2 * 256 * (low + high)));
    for (std::int64_t row = 0; row < 64; ++row) {
      for (std::int64_t col = 0; col < 128; ++col) {
        const auto plane_code = [&](std::int64_t plane_offset, int bits) {
          const std::int64_t fragment = row % 32 / 16, odd = row % 16 / 8,
                             lane = row % 8 * 4 + col % 8 / 2;
          const std::int64_t pair = col % 64 / 8, word = fragment * bits + pair * bits / 8;
          const std::int64_t together = std::min(2 * bits, 4);
          const std::int64_t byte =
              plane_offset + (word / together * 32 + lane) * together * 4 + word % together * 4;
          std::uint32_t value = 0;
          std::memcpy(&value, codes.data() + byte, 4);
          const std::int64_t in_word = pair % (8 / bits), run = low / bits;
          const std::int64_t bit =
              16 * (col % 2) + in_word / run * 2 * low + in_word % run * bits + odd * low;
          return value >> bit & ((1u << bits) - 1);
        };
        const std::int64_t tile = (row / 32 * 2 + col / 64) * 256 * (low + high);
        std::uint32_t code = plane_code(tile, low);
        if (high > 0) code |= plane_code(tile + 256 * low, high) << low;
        const bool inside = row < 45 && col < 100;
        const double want = inside ? dense.q[static_cast<std::size_t>(row * 100 + col)] : 0.0;
        ASSERT_EQ(code, want) << "row " << row << ", column " << col;
      }
    }
  }
}

// Rows and columns that end inside strips, tiles, octets, blocks and bytes.
std::vector<LayerSpec> odd_shapes(BitWidth width) {
  return {shape(width, 1, 64, 64, 256),        shape(width, 1, 64, 33, 200),
          shape(width, 1, 16, 7, 77),          shape(width, 1, std::nullopt, 45, 331),
          shape(width, 1, std::nullopt, 1, 1), shape(width, 0, 16, 48, 136),
          shape(width, 0, 48, 96, 101),        shape(width, 0, std::nullopt, 32, 9)};
}

class PackWidths : public ::testing::TestWithParam<BitWidth> {};

TEST_P(PackWidths, UnpackIsTheInverse) {
  Rng rng(7);
  for (const LayerSpec& spec : odd_shapes(GetParam())) {
    SCOPED_TRACE(::testing::Message() << spec);
    const QuantizedTensor q = random_layer(spec, rng);
    const DeviceCopy copy(q);
    const Tiles tiles(copy.matrix());
    const DeviceArray<std::uint8_t> back(q.W_q.buffer.size);
    unpack(tiles.matrix(), back.data(), q.W_q.shape[1], nullptr);
    EXPECT_EQ(std::memcmp(back.data(), q.W_q.buffer.data, q.W_q.buffer.size), 0);
  }
}

TEST_P(PackWidths, DequantizesToTheSameBits) {
  Rng rng(8);
  for (LayerSpec spec : odd_shapes(GetParam())) {
    spec.col_scale = true;
    SCOPED_TRACE(::testing::Message() << spec);
    const QuantizedTensor q = random_layer(spec, rng);
    const DeviceCopy copy(q);
    const Tiles tiles(copy.matrix());
    const auto size = static_cast<std::size_t>(spec.out_features * spec.in_features);
    for (DType type : {DType::kF16, DType::kF32}) {
      const DeviceArray<std::byte> want(size * dtype_size(type)), got(want.size());
      dequantize(copy.matrix(), want.data(), type, nullptr);
      dequantize(tiles.matrix(), got.data(), type, nullptr);
      EXPECT_EQ(std::memcmp(got.data(), want.data(), want.size()), 0);

      const DeviceArray<std::int64_t> ids(
          std::vector<std::int64_t>{spec.out_features - 1, 0, spec.out_features / 2});
      const std::size_t row = static_cast<std::size_t>(spec.in_features) * dtype_size(type);
      const DeviceArray<std::byte> picked(ids.size() * row);
      dequantize_rows(tiles.matrix(), ids.data(), 3, picked.data(), type, nullptr);
      for (std::size_t i = 0; i < ids.size(); ++i) {
        EXPECT_EQ(std::memcmp(picked.data() + i * row,
                              want.data() + static_cast<std::size_t>(ids[i]) * row, row),
                  0);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Widths, PackWidths, ::testing::ValuesIn(kAllBitWidths));

TEST(Pack, RefusesTheOtherPackingAndLayoutsWithoutTiles) {
  Rng rng(9);
  const QuantizedTensor q = random_layer(shape(BitWidth::k4, 1, 64, 32, 64), rng);
  const DeviceCopy copy(q);
  const Tiles tiles(copy.matrix());
  const DeviceArray<std::uint8_t> out(tiles_bytes(copy.matrix()));
  EXPECT_THROW(pack(tiles.matrix(), out.data(), nullptr), Failure);
  EXPECT_THROW(unpack(copy.matrix(), out.data(), 32, nullptr), Failure);
  DeviceMatrix narrow = copy.matrix();
  narrow.layout.group_size = 8;
  EXPECT_THROW(tiles_bytes(narrow), Failure);
  EXPECT_THROW(pack(narrow, out.data(), nullptr), Failure);
}

}  // namespace
}  // namespace hqq::cuda

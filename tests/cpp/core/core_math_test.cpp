// hqq/core/math.hpp and codec.hpp: exact conversions, powers, packing.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "hqq/bitpack.hpp"
#include "hqq/core/codec.hpp"
#include "hqq/core/group.hpp"
#include "hqq/core/math.hpp"

namespace hqq {
namespace {

using namespace core::scalar;  // NOLINT: the functions under test

TEST(HalfTest, EveryHalfRoundTrips) {
  for (std::uint32_t h = 0; h < 0x10000u; ++h) {
    const auto half = static_cast<std::uint16_t>(h);
    const float x = f16_bits_to_f32(half);
    if (std::isnan(x)) {
      EXPECT_TRUE(std::isnan(f16_bits_to_f32(f32_to_f16_bits(x))));
    } else {
      ASSERT_EQ(f32_to_f16_bits(x), half) << h;
    }
    const float b = bf16_bits_to_f32(half);
    if (!std::isnan(b)) {
      ASSERT_EQ(f32_to_bf16_bits(b), half) << h;
    }
  }
}

TEST(HalfTest, RoundsToTheNearestNeighbourTiesToEven) {
  // Halfway between two halves, and one float to either side of it.
  for (std::uint32_t h = 0; h < 0x7BFFu; ++h) {
    const float low = f16_bits_to_f32(static_cast<std::uint16_t>(h));
    const float high = f16_bits_to_f32(static_cast<std::uint16_t>(h + 1));
    const float middle = low + (high - low) * 0.5f;  // exact: 12 significant bits
    ASSERT_EQ(f32_to_f16_bits(middle), h + (h & 1u)) << h;
    ASSERT_EQ(f32_to_f16_bits(std::nextafter(middle, 0.0f)), h) << h;
    ASSERT_EQ(f32_to_f16_bits(std::nextafter(middle, 1e9f)), h + 1) << h;
  }
}

TEST(HalfTest, OverflowsToInfinity) {
  EXPECT_EQ(f32_to_f16_bits(65519.99f), 0x7BFF);
  EXPECT_EQ(f32_to_f16_bits(65520.0f), 0x7C00);
  EXPECT_EQ(f32_to_f16_bits(-1e30f), 0xFC00);
  EXPECT_TRUE(std::isinf(bf16_bits_to_f32(f32_to_bf16_bits(3.4e38f))));
}

TEST(PowTest, MatchesLibmToSixDigits) {
  for (float p : {-0.3f, -0.5f, 0.7f, 1.5f}) {
    for (float x = 1e-6f; x < 100.0f; x *= 1.01f) {
      const double expected = std::pow(static_cast<double>(x), static_cast<double>(p));
      ASSERT_NEAR(pow_nonnegative(x, p) / expected, 1.0, 2e-6) << x << "^" << p;
    }
  }
}

TEST(ShrinkTest, IsTheGeneralisedSoftThreshold) {
  const float beta = 10.0f;
  const float threshold = static_cast<float>(std::pow(10.0, -1 / 1.3) * 0.999);
  for (float r = -2.0f; r <= 2.0f; r += 0.001f) {
    const double magnitude = std::abs(static_cast<double>(r));
    const double expected =
        std::copysign(std::max(magnitude - std::pow(magnitude, -0.3) / beta, 0.0), r);
    const float found = shrink(r, 0.7f, {1 / beta, threshold});
    ASSERT_NEAR(found, magnitude < 1e-9 ? 0.0 : expected, 1e-5) << r;
  }
  EXPECT_EQ(shrink(0.5f, 1.0f, {0.1f, 0.0f}), 0.4f);
  EXPECT_EQ(shrink(-0.05f, 1.0f, {0.1f, 0.0f}), 0.0f);
}

class PackTest : public testing::TestWithParam<BitWidth> {};

TEST_P(PackTest, RoundTripsEveryLength) {
  std::mt19937 rng(1);
  std::uniform_int_distribution<int> code(0, max_code(GetParam()));
  for (int n = 0; n <= 300; ++n) {
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(n));
    for (auto& c : codes) c = static_cast<std::uint8_t>(code(rng));
    const auto bytes = static_cast<std::size_t>(packed_row_bytes(GetParam(), n));
    // Guard bytes: nothing may be written past the row.
    std::vector<std::uint8_t> packed(bytes + 8, 0xEE);
    pack_row(GetParam(), codes, {packed.data(), bytes});
    for (std::size_t i = bytes; i < packed.size(); ++i) ASSERT_EQ(packed[i], 0xEE) << n;
    std::vector<std::uint8_t> back(codes.size() + 8, 0xEE);
    unpack_row(GetParam(), {packed.data(), bytes}, {back.data(), codes.size()});
    for (std::size_t i = codes.size(); i < back.size(); ++i) ASSERT_EQ(back[i], 0xEE) << n;
    back.resize(codes.size());
    ASSERT_EQ(back, codes) << n;
  }
}

TEST_P(PackTest, SlicesAreValidRows) {
  const std::int64_t step = slice_alignment(GetParam());
  std::vector<std::uint8_t> codes(256);
  for (std::size_t i = 0; i < codes.size(); ++i) {
    codes[i] =
        static_cast<std::uint8_t>(i * 7 % static_cast<std::size_t>(max_code(GetParam()) + 1));
  }
  std::vector<std::uint8_t> packed(static_cast<std::size_t>(packed_row_bytes(GetParam(), 256)));
  pack_row(GetParam(), codes, packed);
  for (std::int64_t begin = 0; begin < 256; begin += step) {
    const auto offset = static_cast<std::size_t>(packed_row_bytes(GetParam(), begin));
    std::vector<std::uint8_t> slice(static_cast<std::size_t>(256 - begin));
    unpack_row(GetParam(), {packed.data() + offset, packed.size() - offset}, slice);
    ASSERT_TRUE(std::equal(slice.begin(), slice.end(), codes.begin() + begin)) << begin;
  }
}

TEST_P(PackTest, RefusesWrongSizes) {
  std::vector<std::uint8_t> codes(64);
  std::vector<std::uint8_t> packed(static_cast<std::size_t>(packed_row_bytes(GetParam(), 64)) + 1);
  EXPECT_THROW(pack_row(GetParam(), codes, packed), std::invalid_argument);
  EXPECT_THROW(unpack_row(GetParam(), packed, codes), std::invalid_argument);
}

INSTANTIATE_TEST_SUITE_P(AllWidths, PackTest, testing::ValuesIn(kAllBitWidths));

TEST(PackFormatTest, BytesAreThoseOfTheFormatPage) {
  const std::vector<std::uint8_t> four = {1, 2, 15, 0};
  std::vector<std::uint8_t> packed(2);
  pack_row(BitWidth::k4, four, packed);
  EXPECT_EQ(packed, (std::vector<std::uint8_t>{0x21, 0x0F}));

  std::vector<std::uint8_t> three(32, 0);
  three[0] = 5;  // low plane 01, high plane 1
  three[9] = 4;  // high plane only
  std::vector<std::uint8_t> planes(12);
  pack_row(BitWidth::k3, three, planes);
  std::vector<std::uint8_t> expected(12, 0);
  expected[0] = 1;
  expected[8] = 1;
  expected[9] = 2;
  EXPECT_EQ(planes, expected);

  const std::vector<std::uint8_t> ternary = {2, 1, 0, 0, 2};
  std::vector<std::uint8_t> byte(1);
  pack_row(BitWidth::kTernary, ternary, byte);
  EXPECT_EQ(byte[0], 2 + 1 * 3 + 2 * 81);
  EXPECT_EQ(packed_row_bytes(BitWidth::kTernary, 64), 13);
}

TEST(NbitsTest, KnowsTheWidthsAndNoOthers) {
  for (BitWidth width : kAllBitWidths) EXPECT_EQ(bit_width_from_nbits(nbits_of(width)), width);
  EXPECT_EQ(bit_width_from_nbits(static_cast<double>(1.58f)), BitWidth::kTernary);
  for (double bad : {0.0, 7.0, 1.5, -4.0, 16.0}) EXPECT_FALSE(bit_width_from_nbits(bad)) << bad;
}

// Every weight is in exactly one group, and lengths add up.
TEST(GroupLayoutTest, CoversTheMatrix) {
  for (int axis : {0, 1}) {
    for (std::int64_t rows : {1, 3, 8, 20}) {
      for (std::int64_t cols : {1, 7, 16, 40}) {
        for (std::int64_t group_size : {8, 16, 64}) {
          const core::GroupLayout layout{rows, cols, group_size, axis};
          std::int64_t total = 0;
          for (std::int64_t g = 0; g < layout.num_groups(); ++g) {
            const std::int64_t n = axis == 1 ? layout.length_in_row(g % layout.groups_per_row())
                                             : layout.strided_length(g);
            ASSERT_GE(n, 1);
            ASSERT_LE(n, group_size);
            total += n;
          }
          ASSERT_EQ(total, rows * cols);
          ASSERT_EQ(layout.metadata_rows() * layout.metadata_cols(), layout.num_groups());
        }
      }
    }
  }
}

}  // namespace
}  // namespace hqq

// The kernels of every instruction set against those of plain C++. Built three times: with the
// library, for what this machine has; with emulated intrinsics (tests/cpp/linear/simde), for
// AVX-512 and VNNI anywhere; and for 64-bit Arm (scripts/test-neon.sh). Hence it needs nothing but
// the kernels.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "src/cpu/linear/choose.hpp"
#include "src/cpu/linear/kernels.hpp"
#include "src/cpu/linear/tiles/column_plan.hpp"
#include "tests/cpp/support/guarded_memory.hpp"

#if !defined(HQQ_TEST_EMULATED_X86) && !defined(HQQ_TEST_NEON)
#include "src/cpu/dispatch.hpp"
#endif

namespace hqq::cpu {
namespace {

using testing::Guard;
using testing::guarded_memory;

std::vector<const LinearKernels*> tables() {
#if defined(HQQ_TEST_EMULATED_X86)
  return {&avx2_vnni::linear_kernels(), &avx512::linear_kernels(), &avx512_vnni::linear_kernels()};
#elif defined(HQQ_TEST_NEON)
  return {&neon::linear_kernels()};
#else
  const std::string original = current_target();
  std::vector<const LinearKernels*> all;
  for (const std::string& target : supported_targets()) {
    set_target(target);
    const LinearKernels* table = &linear_kernels();
    if (std::find(all.begin(), all.end(), table) == all.end()) all.push_back(table);
  }
  set_target(original);
  return all;
#endif
}

// Elements that end at a page nobody may read or write.
template <class T>
class Array {
 public:
  explicit Array(std::int64_t size)
      : size_(static_cast<std::size_t>(size)),
        memory_(guarded_memory(size_ * sizeof(T), Guard::kAfter)) {}
  T* data() const { return reinterpret_cast<T*>(memory_.get()); }
  T* begin() const { return data(); }
  T* end() const { return data() + size_; }
  T& operator[](std::int64_t i) const { return data()[i]; }
  std::int64_t size() const { return static_cast<std::int64_t>(size_); }

 private:
  std::size_t size_;
  std::shared_ptr<std::byte> memory_;
};

template <class T>
bool same_bits(const Array<T>& a, const Array<T>& b) {
  return std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * sizeof(T)) == 0;
}

using Rng = std::mt19937;

// How x, or the codes, are chosen: the extremes make sums overflow that are too narrow.
enum class Values { kRandom, kLargest, kSmallest, kAlternating };
constexpr Values kAllValues[] = {Values::kRandom, Values::kLargest, Values::kSmallest,
                                 Values::kAlternating};

Array<float> make_x(Rng& rng, std::int64_t cols, Values values) {
  std::normal_distribution<float> normal;
  Array<float> x(cols);
  for (std::int64_t k = 0; k < cols; ++k) {
    x[k] = values == Values::kRandom     ? normal(rng)
           : values == Values::kLargest  ? 1.0f
           : values == Values::kSmallest ? -1.0f
                                         : (k % 2 == 0 ? 1.0f : -1.0f);
  }
  return x;
}

// One row of x, prepared by a table.
struct PreparedRow {
  PreparedRow(const LinearKernels& kernels, const Array<float>& x, const float* factor,
              const Columns& columns, bool fast, bool shifted)
      : codes(fast ? columns.padded() : 0),
        values(fast ? 0 : columns.padded()),
        blocks(columns.plan().num_blocks) {
    if (fast) {
      kernels.quantize_x(x.data(), factor, columns.plan(), codes.data(), blocks.data());
    } else {
      kernels.copy_x(x.data(), factor, columns.plan(), shifted, values.data(), blocks.data());
    }
  }
  RowOfX row() const {
    const bool fast = codes.size() > 0;
    return {fast ? codes.data() : nullptr, fast ? nullptr : values.data(), blocks.data()};
  }

  Array<std::int8_t> codes;
  Array<float> values;
  Array<BlockOfX> blocks;
};

// A tile and its scales and zeros, which are float16 values.
struct Tile {
  Tile(Rng& rng, const ColumnPlan& plan, int bits, Values values)
      : codes(plan.units * bits * kFieldBytes),
        scale16(plan.num_groups * kTileRows),
        zero16(scale16.size()),
        scale(scale16.size()),
        zero(scale16.size()) {
    for (std::uint8_t& byte : codes) {
      byte = values == Values::kRandom     ? static_cast<std::uint8_t>(rng())
             : values == Values::kLargest  ? std::uint8_t{0xFF}
             : values == Values::kSmallest ? std::uint8_t{0}
                                           : std::uint8_t{0x7F};
    }
    // Bits of float16: scales of 0.01 to 0.1, zeros up to 256.
    for (std::uint16_t& s : scale16) s = static_cast<std::uint16_t>(0x2100 + rng() % 0x0D00);
    for (std::uint16_t& z : zero16) z = static_cast<std::uint16_t>(rng() % 0x5C00);
    scalar::linear_kernels().read_f16(scale16.data(), scale16.size(), scale.data());
    scalar::linear_kernels().read_f16(zero16.data(), zero16.size(), zero.data());
  }
  Array<std::uint8_t> codes;
  Array<std::uint16_t> scale16, zero16;
  Array<float> scale, zero;
};

std::vector<RowOfX> rows_of(const std::vector<PreparedRow>& x) {
  std::vector<RowOfX> rows;
  for (const PreparedRow& row : x) rows.push_back(row.row());
  return rows;
}

Array<float> by_panels(const LinearKernels& kernels, const Tile& tile, const Columns& columns,
                       const std::vector<PreparedRow>& x, bool fast, int bits) {
  const auto count = static_cast<std::int64_t>(x.size());
  const std::vector<RowOfX> rows = rows_of(x);
  const Array<std::byte> scratch(kPanelScratchBytes);
  Array<float> y(count * kTileRows);
  PanelArgs args{tile.codes.data(),
                 tile.scale.data(),
                 tile.zero.data(),
                 &columns.plan(),
                 0,
                 0,
                 rows.data(),
                 count,
                 scratch.data(),
                 y.data()};
  for (const auto& [first, end] : columns.panels(fast ? kPanelUnitsFast : kPanelUnitsExact)) {
    args.first_block = first;
    args.end_block = end;
    (fast ? kernels.panel_fast : kernels.panel_exact)[bits](args);
  }
  return y;
}

// The last row of x fills a kernel's rows.
// `tiles`: that the kernel takes at a time. It gets the same one as often, and must give the same.
Array<float> by_decoding(TileKernel kernel, const Tile& tile, const Columns& columns,
                         const std::vector<PreparedRow>& x, MetaType type, int tiles) {
  std::vector<RowOfX> rows = rows_of(x);
  rows.resize(kMaxDecodeRows, rows.back());
  Array<float> y(std::max<std::int64_t>(tiles, kMaxDecodeRows) * kTileRows);
  const bool f16 = type == MetaType::kF16;
  TileArgs args{{}, {}, {}, &columns.plan(), rows.data(), y.data()};
  for (int t = 0; t < tiles; ++t) {
    args.codes[t] = tile.codes.data();
    args.scale[t] = f16 ? static_cast<const void*>(tile.scale16.data()) : tile.scale.data();
    args.zero[t] = f16 ? static_cast<const void*>(tile.zero16.data()) : tile.zero.data();
  }
  kernel(args);
  for (int i = kTileRows; i < tiles * kTileRows; ++i) EXPECT_EQ(y[i], y[i - kTileRows]);
  return y;
}

// Two sums of the same terms in another order, D roundings each, differ by at most 2 D u sum
// |terms| (linear_bound.hpp). `x` is not shifted.
void expect_same_sums(const Array<float>& a, const Array<float>& b, const Tile& tile,
                      const Columns& columns, const std::vector<PreparedRow>& x, int bits) {
  const ColumnPlan& plan = columns.plan();
  const double code = (1 << bits) - 1 + (bits == 8 ? 256 : 0);
  const bool fast = x.front().codes.size() > 0;
  const double roundings =
      fast ? static_cast<double>(plan.num_blocks) + 16 : static_cast<double>(columns.padded()) + 16;
  for (std::size_t m = 0; m < x.size(); ++m) {
    for (int lane = 0; lane < kTileRows; ++lane) {
      double magnitude = 0;
      for (std::int64_t i = 0; i < plan.num_blocks; ++i) {
        const Block& block = plan.blocks[i];
        double sum = 0;
        for (std::int64_t k = block.first_col; k < block.first_col + block.cols; ++k) {
          sum += fast ? std::abs(static_cast<double>(x[m].codes[k]))
                      : std::abs(double{x[m].values[k]});
        }
        const std::int64_t group = block.group * kTileRows + lane;
        magnitude += sum * double{x[m].blocks[i].scale} * double{tile.scale[group]} *
                     (code + double{tile.zero[group]});
      }
      const auto at = static_cast<std::int64_t>(m) * kTileRows + lane;
      const double bound = 2 * roundings * std::ldexp(magnitude, -24);
      ASSERT_TRUE(std::abs(double{a[at]} - double{b[at]}) <= bound)
          << a[at] << " and " << b[at] << " +- " << bound << ", row of x " << m << ", lane "
          << lane;
    }
  }
}

struct Shape {
  std::int64_t cols, group_size;
};
// Whole units, tails, groups inside units, groups that begin inside one.
constexpr Shape kShapes[] = {{64, 64},   {32, 32},   {160, 32},  {96, 96},  {333, 64},
                             {256, 128}, {100, 100}, {72, 8},    {200, 24}, {330, 40},
                             {280, 88},  {9, 9},     {640, 640}, {1100, 96}};

core::GroupLayout layout_of(const Shape& shape) {
  return {kTileRows, shape.cols, shape.group_size, 1};
}

class LinearKernelsTest : public ::testing::TestWithParam<const LinearKernels*> {
 protected:
  const LinearKernels& kernels_ = *GetParam();
  const LinearKernels& plain_ = scalar::linear_kernels();
  Rng rng_{1};
};
INSTANTIATE_TEST_SUITE_P(Tables, LinearKernelsTest, ::testing::ValuesIn(tables()),
                         [](const auto& info) { return std::string(info.param->name); });

#if !defined(HQQ_TEST_EMULATED_X86) && !defined(HQQ_TEST_NEON)
// Versions of Highway add targets; none may fall back to what is slower than a worse target has.
TEST(LinearKernelsOfTargets, ABetterTargetHasNoWorseKernels) {
  const std::string original = current_target();
  std::vector<std::string> names;
  for (const std::string& target : supported_targets()) {
    set_target(target);
    names.push_back(linear_kernels().name);
  }
  set_target(original);
  EXPECT_EQ(names.back(), "scalar");
  bool plain = false;
  for (const std::string& name : names) {
    EXPECT_TRUE(name == "scalar" || !plain) << name << " comes after plain kernels";
    plain = name == "scalar";
  }
}
#endif

TEST_P(LinearKernelsTest, ProductsAreThoseOfPlainKernels) {
  for (const Shape& shape : kShapes) {
    const Columns columns(layout_of(shape));
    for (const FieldPacking& packing : kFieldPackings) {
      const int bits = packing.bits;
      const int index = field_packing_index(bits);
      for (Values codes : kAllValues) {
        const Tile tile(rng_, columns.plan(), bits, codes);
        for (bool fast : {true, false}) {
          // All numbers of rows that a panel is divided into.
          const int count = static_cast<int>(rng_() % (rng_() % 2 == 0 ? 5 : 27)) + 1;
          SCOPED_TRACE(::testing::Message()
                       << (fast ? "fast, " : "exact, ") << bits << " bits, " << shape.cols
                       << " columns in groups of " << shape.group_size << ", codes "
                       << static_cast<int>(codes) << ", " << count << " rows");
          std::vector<PreparedRow> x, shifted;
          for (int m = 0; m < count; ++m) {
            const Array<float> row = make_x(rng_, shape.cols, kAllValues[(m + count) % 4]);
            x.emplace_back(plain_, row, nullptr, columns, fast, false);
            shifted.emplace_back(plain_, row, nullptr, columns, fast, true);
          }
          const Array<float> expected = by_panels(plain_, tile, columns, x, fast, index);
          expect_same_sums(by_panels(kernels_, tile, columns, x, fast, index), expected, tile,
                           columns, x, bits);
          const std::int64_t decoded = std::min<std::int64_t>(count, kMaxDecodeRows);
          for (MetaType type : {MetaType::kF32, MetaType::kF16}) {
            if (type == MetaType::kF16 && !decodes_f16(fast, decoded)) continue;
            const TileKernel kernel =
                decode_kernel(kernels_, fast, bits, decoded, columns.plan(), type);
            ASSERT_EQ(kernel == nullptr, columns.plan().block_units == 0 || &kernels_ == &plain_);
            if (kernel == nullptr) continue;
            x.erase(x.begin() + decoded, x.end());
            shifted.erase(shifted.begin() + decoded, shifted.end());
            const int tiles = decode_tiles(fast, bits, static_cast<int>(decoded));
            expect_same_sums(by_decoding(kernel, tile, columns, shifted, type, tiles), expected,
                             tile, columns, x, bits);
          }
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

// Rows of all kinds: the prepared x must be the same to the bit.
TEST_P(LinearKernelsTest, XIsPreparedAsByPlainKernels) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const Shape& shape : kShapes) {
    const Columns columns(layout_of(shape));
    for (float size : {1.0f, 0.0f, 1e-40f, 1e-36f, 1e30f, inf, -inf, std::nanf("")}) {
      const bool many = rng_() % 2 == 0;
      Array<float> x = make_x(rng_, shape.cols, Values::kRandom);
      const bool finite = std::isfinite(size);
      for (float& value : x) value *= finite ? size : 1.0f;
      // Halves are rounded to even: with 127 in the block, the scale is 1.
      for (std::int64_t k = 0; k < shape.cols && size == 1.0f; k += 3) {
        x[k] = k % 9 == 0 ? 127.0f : 2.5f;
      }
      // One of them, or many, whose codes add up.
      const std::int64_t end = many ? shape.cols : shape.cols / 2 + 1;
      for (std::int64_t k = shape.cols / 2; !finite && k < end; ++k) x[k] = size;
      Array<float> factor(shape.cols);
      for (float& f : factor) f = std::ldexp(1.0f + static_cast<float>(rng_() % 64) / 64, -3);
      for (const float* f :
           {static_cast<const float*>(nullptr), static_cast<const float*>(factor.data())}) {
        SCOPED_TRACE(::testing::Message() << shape.cols << " columns in groups of "
                                          << shape.group_size << ", values about " << size);
        const PreparedRow fast(kernels_, x, f, columns, true, false);
        const PreparedRow plain_fast(plain_, x, f, columns, true, false);
        ASSERT_TRUE(same_bits(fast.codes, plain_fast.codes) || !finite);
        ASSERT_TRUE(same_bits(fast.blocks, plain_fast.blocks) || !finite);
        bool all_finite = true;
        for (const BlockOfX& block : fast.blocks) {
          all_finite = all_finite && std::isfinite(block.scale);
        }
        ASSERT_EQ(all_finite, finite) << "NaN and Inf are lost";
        for (bool shifted : {false, true}) {
          const PreparedRow exact(kernels_, x, f, columns, false, shifted);
          const PreparedRow plain_exact(plain_, x, f, columns, false, shifted);
          ASSERT_TRUE(!finite || (same_bits(exact.values, plain_exact.values) &&
                                  same_bits(exact.blocks, plain_exact.blocks)));
          if (!finite) continue;
          Array<float> weights(columns.padded());
          for (float& w : weights) w = static_cast<float>(rng_() % 1000) * 0.25f;
          for (std::int64_t k = shape.cols; k < columns.padded(); ++k) weights[k] = 0;
          const float* values = exact.values.data();
          ASSERT_EQ(kernels_.weighted_sum(values, weights.data(), columns.plan(), shifted),
                    plain_.weighted_sum(values, weights.data(), columns.plan(), shifted));
        }
      }
    }
  }
}

// Axis 0: x times a row of scales, and the sum of it times a row of zeros.
TEST_P(LinearKernelsTest, ScaledXIsPreparedAsByPlainKernels) {
  for (std::int64_t cols : {8, 9, 31, 64, 65, 100, 330, 640}) {
    const Columns columns(layout_of({cols, cols}));
    Array<std::uint16_t> scale16(cols), zero16(cols);
    for (std::uint16_t& s : scale16) s = static_cast<std::uint16_t>(0x2100 + rng_() % 0x0D00);
    for (std::uint16_t& z : zero16) z = static_cast<std::uint16_t>(rng_() % 0x5C00);
    Array<float> scale(cols), zero(columns.padded());
    plain_.read_f16(scale16.data(), cols, scale.data());
    plain_.read_f16(zero16.data(), cols, zero.data());
    for (std::int64_t k = cols; k < columns.padded(); ++k) zero[k] = 0;
    for (Values kind : kAllValues) {
      const Array<float> x = make_x(rng_, cols, kind);
      const auto prepare = [&](MetaType type, PreparedRow& row) {
        const bool f16 = type == MetaType::kF16;
        return kernels_.quantize_scaled_x(
            x.data(), f16 ? static_cast<const void*>(scale16.data()) : scale.data(),
            f16 ? static_cast<const void*>(zero16.data()) : zero.data(), type, columns.plan(),
            row.codes.data(), row.blocks.data());
      };
      const PreparedRow quantized(plain_, x, scale.data(), columns, true, false);
      for (MetaType type : {MetaType::kF32, MetaType::kF16}) {
        PreparedRow row(plain_, x, nullptr, columns, true, false);
        const float sum = prepare(type, row);
        ASSERT_TRUE(same_bits(row.codes, quantized.codes)) << cols;
        ASSERT_TRUE(same_bits(row.blocks, quantized.blocks)) << cols;
        double expected = 0, magnitude = 0;
        for (std::int64_t k = 0; k < cols; ++k) {
          const double term =
              double{row.blocks[k / 64].scale} * row.codes[k] * static_cast<double>(zero[k]);
          expected += term;
          magnitude += std::abs(term);
        }
        ASSERT_NEAR(sum, expected, std::ldexp(magnitude * (static_cast<double>(cols) + 8), -24));
      }
    }
  }
}

TEST_P(LinearKernelsTest, EightBitMetadataIsReadAsByPlainKernels) {
  for (std::int64_t groups : {1, 2, 7}) {
    Array<std::uint8_t> codes(groups * kTileRows);
    for (std::uint8_t& code : codes) code = static_cast<std::uint8_t>(rng_());
    const Array<float> step = make_x(rng_, kTileRows, Values::kRandom);
    const Array<float> offset = make_x(rng_, kTileRows, Values::kRandom);
    Array<float> values(codes.size());
    kernels_.read_u8(codes.data(), groups, step.data(), offset.data(), values.data());
    for (std::int64_t i = 0; i < codes.size(); ++i) {
      // Two roundings: the product may not be fused with the addition.
      const volatile float product = static_cast<float>(codes[i]) * step[i % kTileRows];
      ASSERT_EQ(values[i], product + offset[i % kTileRows]);
    }
  }
}

// The plain kernels themselves, where the answer is plain.
TEST_P(LinearKernelsTest, RoundsToTheNearestCode) {
  const Columns columns(layout_of({40, 40}));
  Array<float> x(40);
  for (std::int64_t k = 0; k < 40; ++k) x[k] = static_cast<float>(k - 20) * 0.5f;
  x[39] = -127.0f;
  const PreparedRow row(kernels_, x, nullptr, columns, true, false);
  float sum = 0;
  for (std::int64_t k = 0; k < 40; ++k) {
    ASSERT_EQ(static_cast<float>(row.codes[k]), std::nearbyint(x[k])) << x[k];
    sum += std::nearbyint(x[k]);
  }
  for (std::int64_t k = 40; k < 64; ++k) ASSERT_EQ(row.codes[k], 0);
  EXPECT_EQ(row.blocks[0].scale, 1.0f);
  EXPECT_EQ(row.blocks[0].sum, sum);
}

TEST_P(LinearKernelsTest, EveryFloat16IsRead) {
  Array<std::uint16_t> all(65536);
  for (std::int64_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint16_t>(i);
  Array<float> values(all.size()), plain(all.size());
  kernels_.read_f16(all.data(), all.size(), values.data());
  plain_.read_f16(all.data(), all.size(), plain.data());
  for (std::int64_t i = 0; i < all.size(); ++i) {
    ASSERT_TRUE(values[i] == plain[i] || (std::isnan(values[i]) && std::isnan(plain[i]))) << i;
  }
  EXPECT_EQ(values[0x3C00], 1.0f);
  EXPECT_EQ(values[1], std::ldexp(1.0f, -24));
  for (std::int64_t count = 0; count < 40; ++count) {
    Array<std::uint16_t> some(count);
    Array<float> out(count);
    for (std::int64_t i = 0; i < count; ++i) some[i] = static_cast<std::uint16_t>(0x3C00 + i);
    kernels_.read_f16(some.data(), count, out.data());
    for (std::int64_t i = 0; i < count; ++i) ASSERT_EQ(out[i], values[0x3C00 + i]);
  }
}

}  // namespace
}  // namespace hqq::cpu

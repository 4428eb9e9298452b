// Linear kernels against products in double.
#include <gtest/gtest.h>

#include "cuda/device/linear/params.hpp"
#include "hqq/core/codec.hpp"
#include "tests/cuda/linear_test_util.hpp"

namespace hqq::cuda {
namespace {

struct Product {
  LayerSpec spec;
  DType x_type = DType::kF16;
  std::int64_t M = 1;
  LinearKernel kernel = LinearKernel::kDecode8;
  int strips = 8, splits = 1;
  bool bias = false;
  std::int64_t x_padding = 0, x_offset = 0, y_padding = 0;
  std::vector<std::int64_t> row_begin{};  // experts; empty: a plain layer
};

std::ostream& operator<<(std::ostream& out, const Product& p) {
  return out << p.spec << ", x " << dtype_name(p.x_type) << " [" << p.M << "], kernel "
             << static_cast<int>(p.kernel) << ", strips " << p.strips << ", splits " << p.splits
             << ", bias " << p.bias << ", experts " << p.row_begin.size();
}

std::vector<std::uint16_t> run(LinearArgs args, const HalfMatrix& y, const Product& p) {
  const LinearPlan plan = make_plan(args, p.kernel, p.strips, p.splits);
  args.workspace_bytes = linear_workspace_bytes(args, plan);
  const DeviceArray<std::byte> workspace(args.workspace_bytes);
  std::memset(workspace.data(), 0, kCounterBytes);
  args.workspace = workspace.data();
  linear(args, plan, nullptr);
  EXPECT_TRUE(y.margins_untouched());
  EXPECT_EQ(std::count(workspace.data(), workspace.data() + kCounterBytes, std::byte{0}),
            static_cast<std::ptrdiff_t>(kCounterBytes))
      << "the counters are zeros for the next call";
  return y.memory.values();
}

void expect_product(const Product& p, unsigned seed = 1) {
  SCOPED_TRACE(::testing::Message() << p);
  Rng rng(seed);
  const int experts = p.row_begin.empty() ? 1 : static_cast<int>(p.row_begin.size()) - 1;
  const PackedLayer layer(p.spec, experts, rng);
  const std::int64_t N = p.spec.out_features, K = p.spec.in_features;
  HalfMatrix x(p.x_type, p.M, K, K + p.x_padding, p.x_offset);
  x.randomize(rng);
  HalfMatrix bias(p.x_type, experts, N, N);
  bias.randomize(rng);
  const HalfMatrix y(p.x_type, p.M, N, N + p.y_padding);

  LinearArgs args = layer.args(p.x_type);
  args.x = x.data();
  args.x_stride = x.stride;
  args.rows = p.M;
  args.y = y.data();
  args.y_stride = y.stride;
  if (p.bias) args.bias = bias.data();
  const DeviceArray<std::int64_t> row_begin(p.row_begin.empty() ? std::vector<std::int64_t>{0}
                                                                : p.row_begin);
  if (!p.row_begin.empty()) args.row_begin = row_begin.data();
  const std::vector<std::uint16_t> bits = run(args, y, p);

  for (int e = 0; e < experts; ++e) {
    const std::int64_t begin = p.row_begin.empty() ? 0 : p.row_begin[static_cast<std::size_t>(e)];
    const std::int64_t end =
        p.row_begin.empty() ? p.M : p.row_begin[static_cast<std::size_t>(e) + 1];
    for (std::int64_t m = begin; m < end; ++m) {
      for (std::int64_t n = 0; n < N; ++n) {
        const Expected want = expected(layer.dense(static_cast<std::size_t>(e)), p.spec.nbits, n, x,
                                       m, p.kernel, p.bias ? bias.value(e, n) : 0.0);
        const double share = std::abs(y.value(m, n) - want.y) / want.error;
        if (!(share <= 1.0)) {  // NaN too
          ADD_FAILURE() << "y[" << m << ", " << n << "] is " << y.value(m, n) << ", not " << want.y
                        << " +- " << want.error;
          return;
        }
      }
    }
  }
  // The same bits again.
  EXPECT_EQ(run(args, y, p), bits);
}

LayerSpec shape(BitWidth width, int axis, std::optional<std::int64_t> group_size, std::int64_t N,
                std::int64_t K) {
  LayerSpec spec;
  spec.nbits = width;
  spec.axis = axis;
  spec.group_size = group_size;
  spec.out_features = N;
  spec.in_features = K;
  return spec;
}

class LinearWidths : public ::testing::TestWithParam<std::tuple<BitWidth, DType>> {};

TEST_P(LinearWidths, DecodesAxis1) {
  const auto [width, x_type] = GetParam();
  expect_product({shape(width, 1, 64, 80, 320), x_type, 1});
  expect_product({shape(width, 1, 48, 33, 200), x_type, 7, LinearKernel::kDecode8, 2, 2, true});
  expect_product({shape(width, 1, 32, 47, 576), x_type, 9, LinearKernel::kDecode16, 1, 2});
}

TEST_P(LinearWidths, MultipliesAxis1) {
  const auto [width, x_type] = GetParam();
  expect_product({shape(width, 1, 64, 80, 320), x_type, 17, LinearKernel::kGemm, 4});
  expect_product({shape(width, 1, 48, 33, 200), x_type, 7, LinearKernel::kGemm, 4, 2, true});
}

TEST_P(LinearWidths, Axis0) {
  const auto [width, x_type] = GetParam();
  // Rows of scales: two to a strip, and one.
  expect_product({shape(width, 0, 16, 48, 136), x_type, 2, LinearKernel::kDecode8, 1, 2, true});
  expect_product({shape(width, 0, 64, 128, 136), x_type, 8, LinearKernel::kDecode8, 8});
  expect_product({shape(width, 0, 16, 48, 136), x_type, 9, LinearKernel::kGemm, 4, 2, true});
}

INSTANTIATE_TEST_SUITE_P(Widths, LinearWidths,
                         ::testing::Combine(::testing::ValuesIn(kAllBitWidths),
                                            ::testing::Values(DType::kF16, DType::kBF16)));

// ---- Shapes, at one width of one plane and one of two.

class LinearShapes : public ::testing::TestWithParam<LinearKernel> {};

TEST_P(LinearShapes, Groups) {
  const int strips = GetParam() == LinearKernel::kGemm ? 4 : 2;
  for (BitWidth width : {BitWidth::k4, BitWidth::k3}) {
    for (std::optional<std::int64_t> group : std::vector<std::optional<std::int64_t>>{
             16, 32, 48, 80, 96, 128, 192, 256, std::nullopt}) {
      // 330: the last group, step and octet are short.
      expect_product({shape(width, 1, group, 40, 330), DType::kF16, 3, GetParam(), strips, 2});
    }
  }
}

TEST_P(LinearShapes, Tokens) {
  const int strips = GetParam() == LinearKernel::kGemm ? 4 : 8;
  for (std::int64_t M : {1, 2, 7, 8, 9, 16, 17, 64, 70}) {
    const bool odd = M % 2 != 0;
    expect_product({shape(BitWidth::k4, 1, 64, 48, 128), odd ? DType::kBF16 : DType::kF16, M,
                    GetParam(), strips, odd ? 2 : 1, odd});
  }
}

TEST_P(LinearShapes, Strides) {
  const int strips = GetParam() == LinearKernel::kGemm ? 4 : 1;
  Product p{shape(BitWidth::k5, 1, 64, 37, 128), DType::kF16, 5, GetParam(), strips, 2};
  for (const auto& [x_padding, x_offset] :
       {std::pair<std::int64_t, std::int64_t>{8, 0}, {3, 0}, {0, 1}, {0, 8}}) {
    p.x_padding = x_padding;
    p.x_offset = x_offset;
    p.y_padding = x_padding;
    expect_product(p);
  }
}

// Columns that end inside a vector of an aligned x, and rows of x that several threads share.
TEST_P(LinearShapes, VectorsOfX) {
  const int strips = GetParam() == LinearKernel::kGemm ? 4 : 2;
  for (std::int64_t K : {150, 152, 1100}) {
    for (bool col_scale : {false, true}) {
      Product p{shape(BitWidth::k4, 1, 64, 36, K), DType::kF16, 7, GetParam(), strips, 1, true};
      p.spec.col_scale = col_scale;
      p.x_padding = (K + 7) / 8 * 8 - K;
      expect_product(p);
    }
  }
}

// More than the block that adds up loads at a time; rows beyond the last strip; y that takes four
// rows in one store, and not.
TEST_P(LinearShapes, ManySplits) {
  const int strips = GetParam() == LinearKernel::kGemm ? 4 : 8;
  for (std::int64_t N : {96, 99}) {
    for (int splits : {8, 9, 11}) {
      expect_product({shape(BitWidth::k8, 1, 64, N, 64 * splits), DType::kBF16, 13, GetParam(),
                      strips, splits, true});
    }
  }
}

TEST_P(LinearShapes, Cuts) {
  if (GetParam() == LinearKernel::kGemm) {
    for (int splits : {1, 2, 3, 7}) {
      expect_product({shape(BitWidth::k2, 1, 64, 140, 448), DType::kF16, 3, GetParam(), 4, splits});
    }
    return;
  }
  for (int strips : {1, 2, 4, 8}) {
    for (int splits : {1, 2, 3, 7}) {
      expect_product(
          {shape(BitWidth::k6, 1, 128, 72, 448), DType::kBF16, 3, GetParam(), strips, splits});
    }
  }
}

TEST_P(LinearShapes, ColScale) {
  const int strips = GetParam() == LinearKernel::kGemm ? 4 : 2;
  Product p{shape(BitWidth::k4, 1, 64, 40, 150), DType::kF16, 3, GetParam(), strips, 1, true};
  p.spec.col_scale = true;
  expect_product(p);
  p.x_type = DType::kBF16;
  expect_product(p);
  // Each expert has its own.
  p.row_begin = {0, 2, 2, 3};
  expect_product(p);
}

TEST_P(LinearShapes, MetadataTypes) {
  const int strips = GetParam() == LinearKernel::kGemm ? 4 : 2;
  Product p{shape(BitWidth::k4, 1, 32, 40, 150), DType::kF16, 3, GetParam(), strips, 1};
  for (DType x_type : {DType::kF16, DType::kBF16}) {
    p.x_type = x_type;
    for (DType type : {DType::kF32, DType::kBF16}) {
      p.spec.meta_dtype = type;
      expect_product(p);
    }
    p.spec.meta_dtype = DType::kF16;
    p.spec.quant_zero = true;
    expect_product(p);
    p.spec.quant_scale = true;
    expect_product(p);
    p.spec.quant_scale = p.spec.quant_zero = false;
  }
}

TEST_P(LinearShapes, Experts) {
  const int strips = GetParam() == LinearKernel::kGemm ? 4 : 2;
  for (int splits : {1, 2}) {
    Product p{
        shape(BitWidth::k4, 1, 64, 40, 128), DType::kF16, 20, GetParam(), strips, splits, true};
    // Without tokens, with one, and with more than a block takes at a time.
    p.row_begin = {0, 0, 1, 1, 20, 20};
    expect_product(p);
  }
  Product many{shape(BitWidth::k4, 1, 64, 24, 64), DType::kF16, 150, GetParam(), strips, 1};
  many.row_begin = {0, 3, 150, 150, 150, 150, 150, 150, 150};
  expect_product(many);
}

INSTANTIATE_TEST_SUITE_P(Kernels, LinearShapes,
                         ::testing::Values(LinearKernel::kDecode8, LinearKernel::kDecode16,
                                           LinearKernel::kGemm));

TEST(FusedAxis0, Shapes) {
  for (LinearKernel kernel : {LinearKernel::kDecode8, LinearKernel::kGemm}) {
    const int strips = kernel == LinearKernel::kGemm ? 4 : 2;
    // One group a column; groups of a strip and a half; odd columns; col_scale; experts.
    expect_product({shape(BitWidth::k4, 0, std::nullopt, 48, 100), DType::kF16, 3, kernel, strips});
    expect_product({shape(BitWidth::k3, 0, 48, 96, 100), DType::kBF16, 9, kernel, strips, 2, true});
    Product p{shape(BitWidth::k8, 0, 32, 64, 77), DType::kBF16, 3, kernel, strips};
    p.spec.meta_dtype = DType::kF32;
    p.spec.col_scale = true;
    p.row_begin = {0, 1, 1, 3};
    expect_product(p);
  }
}

// ---- What is chosen, and what is refused.

core::GroupLayout layout(int axis, std::int64_t group_size, std::int64_t rows, std::int64_t cols) {
  return {rows, cols, group_size, axis};
}

TEST(LinearSupport, LayoutsAndTypes) {
  EXPECT_TRUE(has_tiles(layout(1, 64, 100, 100)));
  EXPECT_TRUE(has_tiles(layout(1, 100, 100, 100))) << "one group a row";
  EXPECT_FALSE(has_tiles(layout(1, 8, 100, 100)));
  EXPECT_FALSE(has_tiles(layout(1, 40, 100, 100)));
  EXPECT_TRUE(has_tiles(layout(0, 16, 64, 100)));
  EXPECT_FALSE(has_tiles(layout(0, 64, 100, 100))) << "groups run across columns";
  EXPECT_FALSE(has_tiles(layout(0, 8, 64, 100)));
  EXPECT_TRUE(has_tiles(layout(1, 64, 16, std::int64_t{1} << 19)));
  EXPECT_FALSE(has_tiles(layout(1, 64, 16, (std::int64_t{1} << 19) + 1)));

  const DeviceTraits sm80{80, 108, 163 * 1024}, sm75{75, 40, 64 * 1024};
  EXPECT_TRUE(has_product(DType::kF16, sm80));
  EXPECT_TRUE(has_product(DType::kBF16, sm80));
  EXPECT_FALSE(has_product(DType::kF32, sm80));
  EXPECT_TRUE(has_product(DType::kF16, sm75));
  EXPECT_FALSE(has_product(DType::kBF16, sm75));
}

TEST(LinearChoice, EveryPlanIsWhole) {
  for (const DeviceTraits& device :
       {DeviceTraits{75, 40, 64 * 1024}, DeviceTraits{80, 108, 163 * 1024},
        DeviceTraits{90, 132, 227 * 1024}}) {
    for (BitWidth width : {BitWidth::k8, BitWidth::k4, BitWidth::k1}) {
      for (int axis : {0, 1}) {
        for (std::int64_t N : {64, 4096, 16384, 151936}) {
          for (std::int64_t K : {64, 2880, 4096, 16384, 28672}) {
            for (std::int64_t M : {1, 8, 12, 16, 64, 256, 4096}) {
              LinearArgs args;
              args.weight.layout = {N, K, 64, axis};
              args.weight.width = width;
              args.rows = M;
              const LinearPlan plan = choose_linear(args, device);
              SCOPED_TRACE(::testing::Message()
                           << "sm_" << device.compute << ", " << nbits_of(width) << " bits, axis "
                           << axis << ", W [" << N << ", " << K << "], M " << M << ": kernel "
                           << static_cast<int>(plan.kernel) << ", strips " << plan.strips_per_block
                           << ", splits " << plan.splits << " of " << plan.tiles_per_split);
              const std::int64_t tiles = div_up(K, 64);
              ASSERT_GE(plan.splits * plan.tiles_per_split, tiles);
              ASSERT_LT((plan.splits - 1) * plan.tiles_per_split, tiles);
              ASSERT_LE(shared_bytes(args, plan).all(), device.max_shared_bytes);
              ASSERT_TRUE(counters_suffice(args, plan));
              ASSERT_EQ(plan.token_blocks, div_up(M, tokens_of(plan.kernel)));
              ASSERT_FALSE(axis == 0 && plan.kernel == LinearKernel::kDecode16);
              // A small layer is spread over the device.
              if (K == 4096 && N == 4096 && M == 1) {
                ASSERT_GE(2 * div_up(N, 32 * plan.strips_per_block) * plan.splits,
                          device.multiprocessors);
              }
            }
          }
        }
      }
    }
  }
}

TEST(LinearChoice, KernelsByTokens) {
  const DeviceTraits device{90, 132, 227 * 1024};
  const auto kernel = [&](std::int64_t rows, std::int64_t experts) {
    LinearArgs args;
    args.weight.layout = {4096, 4096, 64, 1};
    args.rows = rows;
    args.experts = experts;
    return choose_linear(args, device).kernel;
  };
  EXPECT_EQ(kernel(1, 1), LinearKernel::kDecode8);
  EXPECT_EQ(kernel(8, 1), LinearKernel::kDecode8);
  EXPECT_EQ(kernel(9, 1), LinearKernel::kDecode16);
  EXPECT_EQ(kernel(17, 1), LinearKernel::kGemm);
  EXPECT_EQ(kernel(64, 8), LinearKernel::kDecode8) << "eight tokens for each expert";
  EXPECT_EQ(kernel(256, 8), LinearKernel::kGemm);
}

TEST(Linear, ChoosesAndRefuses) {
  Rng rng(5);
  const PackedLayer layer(shape(BitWidth::k4, 1, 64, 40, 128), 1, rng);
  HalfMatrix x(DType::kF16, 3, 128, 128);
  x.randomize(rng);
  const HalfMatrix y(DType::kF16, 3, 40, 40);
  LinearArgs args = layer.args(DType::kF16);
  args.x = x.data();
  args.x_stride = 128;
  args.rows = 3;
  args.y = y.data();
  args.y_stride = 40;
  args.workspace_bytes = linear_workspace_bytes(args);
  const DeviceArray<std::byte> workspace(args.workspace_bytes);
  std::memset(workspace.data(), 0, kCounterBytes);
  args.workspace = workspace.data();
  linear(args, nullptr);
  for (std::int64_t n = 0; n < 40; ++n) {
    const Expected want =
        expected(layer.dense(0), BitWidth::k4, n, x, 2, LinearKernel::kDecode8, 0.0);
    EXPECT_NEAR(y.value(2, n), want.y, want.error);
  }

  LinearArgs small = args;
  small.workspace_bytes -= 1;
  EXPECT_THROW(linear(small, nullptr), Failure);
  const LinearPlan no_instance{LinearKernel::kDecode16, 8, 1, 2, 1};
  LinearArgs axis0 = args;
  axis0.weight.layout = {32, 128, 32, 0};
  EXPECT_THROW(linear(axis0, no_instance, nullptr), Failure);
  LinearArgs nothing = args;
  nothing.rows = 0;
  nothing.workspace_bytes = 0;
  EXPECT_NO_THROW(linear(nothing, nullptr));
}

TEST(Divider, IsExact) {
  for (int divisor = 1; divisor <= 1 << 15; divisor += divisor < 300 ? 1 : 97) {
    device::Divider divide;
    divide.divisor = static_cast<std::uint32_t>(divisor);
    divide.factor =
        static_cast<std::uint32_t>(div_up(std::int64_t{1} << device::Divider::kShift, divisor));
    for (int n = 0; n <= 1 << 15; ++n) ASSERT_EQ(divide(n), n / divisor) << n << " / " << divisor;
  }
}

}  // namespace
}  // namespace hqq::cuda

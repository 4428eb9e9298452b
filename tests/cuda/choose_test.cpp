// Which matrices and types have linear kernels, and which of them is chosen.
#include "cuda/linear/choose.hpp"

#include <gtest/gtest.h>

#include <algorithm>

#include "cuda/device/linear/params.hpp"
#include "cuda/tiles.hpp"

namespace hqq::cuda {
namespace {

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

// RowScaleStream: what a stage of tiles needs is in the ring at the same time.
TEST(LinearChoice, TheRingHasTheGroupsOfAStage) {
  for (std::int64_t group_size : {16, 32, 48, 64, 80, 96, 112, 128, 192, 208, 256, 4096}) {
    const core::GroupLayout q = layout(1, group_size, 32, 16384);
    for (int tiles : {1, 2, 4}) {
      SCOPED_TRACE(::testing::Message() << "groups of " << group_size << ", " << tiles << " tiles");
      const std::int64_t ring = ring_groups(q, tiles);
      std::int64_t most = 0;
      for (std::int64_t col = 0; col < q.cols; col += 64 * tiles) {
        const std::int64_t first = col / group_size, last = (col + 64 * tiles - 1) / group_size;
        most = std::max(most, last / 4 - first / 4 + 1);
      }
      EXPECT_GE(ring, 4 * most);
      EXPECT_LE(ring, 16) << "or it takes more shared memory than an old GPU has";
      EXPECT_EQ(ring & (ring - 1), 0);
    }
  }
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

// Quantizing on the GPU gives the bytes of the CPU, whatever the settings; on the SIMT shim.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "src/config/config_json.hpp"
#include "tests/cuda/quantize_test_util.hpp"

namespace hqq::cuda_testing {
namespace {

void expect_same(const std::vector<float>& W, const Case& c) {
  SCOPED_TRACE(layer_config_to_json(c.config).dump() + " [" + std::to_string(c.rows) + ", " +
               std::to_string(c.cols) + "] " + std::string(dtype_name(c.dtype)));
  const std::vector<std::byte> bytes = stored(W, c);
  QuantizeStats stats;
  QuantizedTensor expected = on_cpu(bytes, c, &stats);
  Result result = on_gpu(bytes, c);
  EXPECT_EQ(result.problems.nonfinite, 0u);
  EXPECT_EQ(result.problems.first_overflow, cuda::kNoProblem.first_overflow);
  const auto wanted = present(expected);
  const auto got = present(result.q);
  ASSERT_EQ(wanted.size(), got.size());
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    const Buffer& a = wanted[i].second->buffer;
    const Buffer& b = got[i].second->buffer;
    ASSERT_EQ(a.size, b.size) << wanted[i].first;
    const std::span<const std::byte> x(a.data, a.size), y(b.data, b.size);
    const auto at = std::mismatch(x.begin(), x.end(), y.begin()).first - x.begin();
    EXPECT_EQ(static_cast<std::size_t>(at), a.size) << wanted[i].first << " differs at this byte";
  }
  // The CPU adds in float, in 16 slots a row: each sum is off by at most (cols / 16 + 2) roundings
  // of 2^-24, its terms by two; a root halves that.
  QuantizeStats ours;
  write_stats({result.errors.abs_sum, result.errors.square_sum, result.errors.weight_square_sum,
               result.errors.max_abs},
              c.rows * c.cols, ours);
  const double relative = (static_cast<double>(c.cols) / 16 + 4) * 0x1p-24;
  EXPECT_NEAR(ours.mean_abs_error, stats.mean_abs_error, relative * stats.mean_abs_error);
  EXPECT_NEAR(ours.rms_error, stats.rms_error, relative * stats.rms_error);
  EXPECT_NEAR(ours.relative_error, stats.relative_error, relative * stats.relative_error);
  EXPECT_NEAR(ours.max_abs_error, stats.max_abs_error, 0x1p-23 * stats.max_abs_error);
}

constexpr Solver kSolvers[] = {Solver::kMinMax, Solver::kJoint, Solver::kHqq};

TEST(CudaQuantizeTest, EveryWidthSolverAndAxis) {
  // 70 columns: tails of groups, of bit planes and of ternary blocks; groups of axis 0 cross rows.
  const std::vector<float> W = gaussian(6 * 70);
  for (BitWidth nbits : kAllBitWidths) {
    for (Solver solver : kSolvers) {
      for (int axis : {1, 0}) {
        expect_same(W, {config_of(nbits, solver, 64, axis), DType::kF32, 6, 70});
      }
    }
  }
}

TEST(CudaQuantizeTest, EveryWeightTypeMetadataTypeAndStride) {
  const std::vector<float> W = gaussian(5 * 96);
  for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kF64}) {
    for (DType meta_dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
      for (int axis : {1, 0}) {
        LayerConfig config = config_of(BitWidth::k4, Solver::kJoint, 32, axis);
        config.meta_dtype = meta_dtype;
        expect_same(W, {config, dtype, 5, 96, 3});
      }
    }
  }
}

TEST(CudaQuantizeTest, EveryGroupSize) {
  // Beside blocks of codes and across them; up to a whole row or column.
  const std::vector<float> W = gaussian(24 * 104);
  for (std::optional<std::int64_t> group_size :
       std::vector<std::optional<std::int64_t>>{8, 24, 40, 96, 104, 200, std::nullopt}) {
    for (BitWidth nbits : {BitWidth::k4, BitWidth::k3, BitWidth::kTernary}) {
      for (int axis : {1, 0}) {
        expect_same(W, {config_of(nbits, Solver::kMinMax, group_size, axis), DType::kF32, 24, 104});
      }
    }
    expect_same(W, {config_of(BitWidth::k2, Solver::kJoint, group_size, 1), DType::kF16, 24, 104});
  }
}

TEST(CudaQuantizeTest, GroupsTooLongForSharedMemory) {
  for (Solver solver : kSolvers) {
    for (bool weighted : {false, true}) {
      Case row{config_of(BitWidth::k4, solver, 1824, 1), DType::kBF16, 2, 4000, 5};
      if (weighted) row.importance = column_importance(row.cols);
      expect_same(gaussian(row.rows * row.cols), row);
      // Five groups of 1824 weights and of 1823, spread over three columns.
      Case strided{config_of(BitWidth::k4, solver, 1824, 0), DType::kF32, 3039, 3};
      if (weighted) strided.importance = column_importance(strided.cols);
      expect_same(gaussian(strided.rows * strided.cols), strided);
      // Fits, but for few groups a block.
      row.cols = 700;
      if (weighted) row.importance = column_importance(row.cols);
      expect_same(gaussian(row.rows * row.cols), row);
    }
  }
}

TEST(CudaQuantizeTest, Importance) {
  const std::vector<float> W = gaussian(10 * 100);
  for (BitWidth nbits : {BitWidth::k8, BitWidth::k3}) {
    for (Solver solver : {Solver::kJoint, Solver::kHqq}) {
      for (int axis : {1, 0}) {
        expect_same(W, {config_of(nbits, solver, 48, axis), DType::kF32, 10, 100, 0,
                        column_importance(100)});
      }
    }
  }
}

TEST(CudaQuantizeTest, Balance) {
  for (int axis : {1, 0}) {
    for (bool weighted : {false, true}) {
      // More rows than a panel has, and a last tile that is narrower.
      Case c{config_of(BitWidth::k4, Solver::kJoint, 32, axis), DType::kBF16, 270, 72, 1};
      c.config.balance = Balance::kSinkhorn;
      if (weighted) c.importance = column_importance(c.cols);
      expect_same(uneven(c.rows, c.cols), c);
    }
    // Tiles of 256 columns, whose panels have fewer rows; a tile of one column; groups that do not
    // fit shared memory.
    for (const auto& [rows, cols] : {std::pair(130, 300), std::pair(20, 513)}) {
      Case c{config_of(BitWidth::k3, Solver::kMinMax, std::nullopt, axis), DType::kF32, rows, cols};
      c.config.balance = Balance::kSinkhorn;
      c.config.meta_dtype = DType::kF32;
      expect_same(uneven(c.rows, c.cols), c);
    }
  }
}

TEST(CudaQuantizeTest, MetadataInEightBits) {
  // 320 groups: two whole blocks and a part of one.
  const std::vector<float> W = uneven(40, 64);
  for (const auto& [quant_scale, quant_zero] :
       {std::pair(true, true), std::pair(true, false), std::pair(false, true)}) {
    for (Solver solver : kSolvers) {
      for (int axis : {1, 0}) {
        LayerConfig config = config_of(BitWidth::k4, solver, 8, axis);
        config.quant_scale = quant_scale;
        config.quant_zero = quant_zero;
        expect_same(W, {config, DType::kF32, 40, 64});
      }
    }
  }
}

TEST(CudaQuantizeTest, HqqStopsWhenTheCpuDoes) {
  // 800 groups: four blocks of the error sum.
  const std::vector<float> W = uneven(100, 64);
  for (int iterations : {1, 5, 7, 20}) {
    for (double lp_norm : {0.7, 1.0}) {
      LayerConfig config = config_of(BitWidth::k2, Solver::kHqq, 8, 1);
      config.iterations = iterations;
      config.lp_norm = lp_norm;
      config.beta = 3.0;
      config.kappa = 1.2;
      config.grow_beta = lp_norm == 1.0;
      expect_same(W, {config, DType::kF32, 100, 64});
    }
  }
}

TEST(CudaQuantizeTest, JointWithOtherNormsAndRefits) {
  const std::vector<float> W = gaussian(8 * 64);
  for (double lp_norm : {0.7, 1.0, 2.0}) {
    for (int iterations : {1, 4}) {
      LayerConfig config = config_of(BitWidth::k3, Solver::kJoint, 32, 1);
      config.lp_norm = lp_norm;
      config.iterations = iterations;
      expect_same(W, {config, DType::kF32, 8, 64});
    }
  }
}

TEST(CudaQuantizeTest, HostileWeights) {
  // A row each: zeros, constants of both signs, a tiny range beside the mean, subnormals, an
  // outlier, signed zeros, large values.
  constexpr std::int64_t kRows = 9, kCols = 48;
  std::vector<float> W = gaussian(kRows * kCols);
  const auto row = [&](int r) {
    return std::span(W).subspan(static_cast<std::size_t>(r * kCols), kCols);
  };
  std::ranges::fill(row(0), 0.0f);
  std::ranges::fill(row(1), 3.1f);
  std::ranges::fill(row(2), -0.7f);
  for (float& w : row(3)) w = 1000.0f + w * 1e-4f;
  for (float& w : row(4)) w *= 1e-41f;
  row(5)[7] = 20000.0f;
  for (std::size_t i = 0; i < kCols; ++i) row(6)[i] = i % 3 == 0 ? -0.0f : 0.0f;
  for (float& w : row(7)) w *= 5000.0f;
  for (BitWidth nbits : kAllBitWidths) {
    for (Solver solver : kSolvers) {
      for (int axis : {1, 0}) {
        LayerConfig config = config_of(nbits, solver, 24, axis);
        // hqq's zero is -min / scale even where that is large.
        if (solver == Solver::kHqq) config.meta_dtype = DType::kF32;
        expect_same(W, {config, DType::kF32, kRows, kCols});
      }
    }
  }
  Case balanced{config_of(BitWidth::k4, Solver::kJoint, 24, 1), DType::kF32, kRows, kCols};
  balanced.config.balance = Balance::kSinkhorn;
  balanced.config.meta_dtype = DType::kF32;
  expect_same(W, balanced);
  // Beside subnormal scales the steps of 8 bits are too coarse for all others.
  balanced.config.quant_scale = balanced.config.quant_zero = true;
  EXPECT_THROW(on_cpu(stored(W, balanced), balanced, nullptr), std::invalid_argument);
  EXPECT_EQ(on_gpu(stored(W, balanced), balanced).problems.first_overflow, 0u);
  std::ranges::fill(row(4), 0.25f);
  expect_same(W, balanced);
}

TEST(CudaQuantizeTest, RandomSettings) {
  std::mt19937 rng(7);
  const auto below = [&](int n) { return static_cast<int>(rng() % static_cast<unsigned>(n)); };
  for (int i = 0; i < 150; ++i) {
    Case c;
    c.rows = 1 + below(40);
    c.cols = 1 + below(150);
    c.padding = below(3);
    c.dtype = std::array{DType::kF32, DType::kF16, DType::kBF16, DType::kF64}[below(4)];
    c.config =
        config_of(kAllBitWidths[below(8)], kSolvers[below(3)], 8 * (1 + below(20)), below(2));
    c.config.balance = below(2) == 0 ? Balance::kNone : Balance::kSinkhorn;
    c.config.quant_scale = below(4) == 0;
    c.config.quant_zero = below(4) == 0;
    c.config.meta_dtype = std::array{DType::kF32, DType::kF16, DType::kBF16}[below(3)];
    if (below(4) == 0) c.config.lp_norm = 0.8;
    if (below(3) == 0) c.importance = column_importance(c.cols + 1);
    if (!c.importance.empty()) c.importance.erase(c.importance.begin());  // the first is 0
    expect_same(uneven(c.rows, c.cols), c);
  }
}

}  // namespace
}  // namespace hqq::cuda_testing

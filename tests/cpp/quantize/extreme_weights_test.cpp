// hqq::Quantizer on weights at the ends of what numbers hold: constant, tiny, huge.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "hqq/eigen.hpp"
#include "hqq/quantizer.hpp"
#include "src/format/float_values.hpp"

namespace hqq {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

RowMajorMatrix gaussian(Eigen::Index rows, Eigen::Index cols) {
  std::mt19937 rng(0);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  RowMajorMatrix W(rows, cols);
  for (Eigen::Index i = 0; i < W.size(); ++i) W.data()[i] = normal(rng);
  return W;
}

LayerConfig plain(BitWidth nbits = BitWidth::k4, Solver solver = Solver::kJoint) {
  LayerConfig config;
  config.nbits = nbits;
  config.solver = solver;
  config.balance = Balance::kNone;
  return config;
}

QuantizedTensor quantize(const RowMajorMatrix& W, const LayerConfig& config,
                         const QuantizeOptions& options = {}) {
  return Quantizer(HqqConfig(config)).quantize(W, "", options);
}

TEST(DegenerateTest, ConstantAndZeroGroupsAreExact) {
  for (BitWidth nbits : kAllBitWidths) {
    for (Solver solver : {Solver::kMinMax, Solver::kJoint}) {
      RowMajorMatrix W(4, 64);
      W.row(0).setZero();
      W.row(1).setConstant(0.375f);
      W.row(2).setConstant(-2.5f);
      W.row(3).setConstant(1e-6f);
      const RowMajorMatrix W_r = dequantize_matrix(quantize(W, plain(nbits, solver)));
      EXPECT_EQ(W_r.topRows(3), W.topRows(3)) << nbits_of(nbits);
      EXPECT_NEAR(W_r(3, 0), 1e-6f, 6e-8f);
    }
  }
}

TEST(DegenerateTest, TinyRangeBesideLargeMeanStaysClose) {
  RowMajorMatrix W = gaussian(4, 64) * 1e-5f;
  W.array() += 100.0f;
  for (Solver solver : {Solver::kMinMax, Solver::kJoint}) {
    const RowMajorMatrix d = W - dequantize_matrix(quantize(W, plain(BitWidth::k4, solver)));
    EXPECT_LT(d.cwiseAbs().maxCoeff(), 0.05f);  // half a step of float16 at 100 is 0.03
  }
}

TEST(DegenerateTest, SubnormalWeightsStayFinite) {
  RowMajorMatrix W = gaussian(4, 64) * 1e-40f;
  for (DType meta : {DType::kBF16, DType::kF32}) {
    LayerConfig config = plain();
    config.meta_dtype = meta;
    const RowMajorMatrix W_r = dequantize_matrix(quantize(W, config));
    EXPECT_TRUE(W_r.allFinite());
    EXPECT_LE(W_r.cwiseAbs().maxCoeff(), 1e-6f);
  }
}

TEST(DegenerateTest, ScaleThatOverflowsFloat16IsRefused) {
  RowMajorMatrix W = gaussian(4, 64);
  W(2, 5) = 1e7f;
  EXPECT_THAT([&] { quantize(W, plain()); },
              ThrowsMessage<std::invalid_argument>(
                  testing::AllOf(HasSubstr("row 2, group 0"), HasSubstr("bfloat16 or float32"))));
  LayerConfig wide = plain();
  wide.meta_dtype = DType::kF32;
  EXPECT_TRUE(dequantize_matrix(quantize(W, wide)).allFinite());
}

TEST(DegenerateTest, ScaleThatUnderflowsFloat16IsRefused) {
  const auto refusal = [](const RowMajorMatrix& W, const LayerConfig& config) -> std::string {
    try {
      quantize(W, config);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  const RowMajorMatrix W = gaussian(4, 128);
  for (float size : {1e-7f, 1e-9f, 1e-30f}) {
    const RowMajorMatrix tiny = W * size;
    EXPECT_EQ(refusal(tiny, plain()),
              "[quantize] the scale of 8 groups, of which row 0, group 0 is the first, is at most "
              "5.96e-08, too small for float16; use meta_dtype bfloat16 or float32, or larger "
              "weights");
    for (const auto& [meta_dtype, quant_scale] :
         {std::pair(DType::kBF16, false), std::pair(DType::kF32, false),
          std::pair(DType::kF16, true)}) {
      LayerConfig wide = plain();
      wide.meta_dtype = meta_dtype;
      wide.quant_scale = quant_scale;
      EXPECT_EQ(refusal(tiny, wide), "");
    }
  }
  const RowMajorMatrix constant = RowMajorMatrix::Constant(1, 64, 1e-9f);
  EXPECT_THAT(refusal(constant, plain(BitWidth::k4, Solver::kMinMax)),
              HasSubstr("the scale of row 0, group 0 is at most"));
  EXPECT_EQ(refusal(constant, plain()), "");  // joint's zero stands for it
  EXPECT_EQ(refusal(RowMajorMatrix::Zero(4, 64), plain()), "");
  // 8 bits need more: codes at the ends of the range are 127 steps away from its middle.
  EXPECT_THAT(refusal(W * 1e-5f, plain(BitWidth::k8)), HasSubstr("is at most 9.5e-07"));
  EXPECT_EQ(refusal(W * 1e-5f, plain(BitWidth::k4)), "");
}

TEST(DegenerateTest, DeadGroupsBesideOthersAreNotRefused) {
  for (const int axis : {0, 1}) {
    for (const Balance balance : {Balance::kNone, Balance::kSinkhorn}) {
      LayerConfig config = plain(BitWidth::k8);
      config.axis = axis;
      config.balance = balance;
      RowMajorMatrix W = gaussian(64, 128);
      W.topRows(32) *= 1e-9f;
      W.col(3) *= 1e-9f;
      QuantizeStats stats;
      QuantizeOptions options;
      options.stats = &stats;
      quantize(W, config, options);
      EXPECT_LT(stats.relative_error, 0.012);
    }
  }
}

TEST(BalanceTest, FactorsOfAnyColumnsAreAboveZero) {
  for (int columns = 1; columns <= 5; ++columns) {
    RowMajorMatrix W = gaussian(8, 256) * 1e-3f;
    W.rightCols(256 - columns) *= std::ldexp(1.0f, -29);
    LayerConfig config = plain();
    config.balance = Balance::kSinkhorn;
    const QuantizedTensor q = quantize(W, config);
    for (const float factor : read_values(q.col_scale)) EXPECT_GT(factor, 0.0f);
    EXPECT_TRUE(dequantize_matrix(q).allFinite());
  }
}

TEST(DegenerateTest, StatisticsOfExtremeWeights) {
  for (float size : {1e29f, 1e-30f, 1e-42f}) {
    const RowMajorMatrix W = gaussian(4, 64) * size;
    LayerConfig config = plain();
    config.meta_dtype = DType::kF32;
    QuantizeStats stats;
    QuantizeOptions options;
    options.stats = &stats;
    quantize(W, config, options);
    EXPECT_TRUE(std::isfinite(stats.rms_error)) << size;
    EXPECT_GT(stats.relative_error, 0.01) << size;
    EXPECT_LE(stats.relative_error, 1.0) << size;
  }
}

}  // namespace
}  // namespace hqq

// hqq::Quantizer: errors, degenerate input, guarantees, and bit-identical results on every target.
#include "hqq/quantizer.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "hqq/core/math.hpp"
#include "hqq/eigen.hpp"
#include "hqq/error.hpp"
#include "src/cpu/dispatch.hpp"

namespace hqq {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

RowMajorMatrix gaussian(Eigen::Index rows, Eigen::Index cols, unsigned seed = 0) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  RowMajorMatrix W(rows, cols);
  for (Eigen::Index i = 0; i < W.size(); ++i) W.data()[i] = normal(rng);
  return W;
}

std::vector<std::byte> bytes_of(const QuantizedTensor& q) {
  std::vector<std::byte> all;
  for (const auto& [name, tensor] : q.tensors()) {
    all.insert(all.end(), tensor->buffer.data, tensor->buffer.data + tensor->buffer.size);
  }
  return all;
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

double rms(const RowMajorMatrix& a, const RowMajorMatrix& b) {
  return std::sqrt((a - b).cast<double>().squaredNorm() / static_cast<double>(a.size()));
}

TEST(QuantizerTest, ErrorsOnGaussianWeightsAreThoseOfTheDocs) {
  const RowMajorMatrix W = gaussian(512, 1024);
  const auto error = [&](BitWidth nbits, Solver solver) {
    return rms(W, dequantize_matrix(quantize(W, plain(nbits, solver))));
  };
  // docs/solver.md; a wrong sign or a lost pass moves these by far more than 1 %.
  EXPECT_NEAR(error(BitWidth::k4, Solver::kMinMax), 0.0896, 0.0009);
  EXPECT_NEAR(error(BitWidth::k4, Solver::kHqq), 0.0870, 0.0009);
  EXPECT_NEAR(error(BitWidth::k4, Solver::kJoint), 0.0816, 0.0008);
  EXPECT_NEAR(error(BitWidth::k3, Solver::kJoint), 0.1645, 0.0016);
  EXPECT_NEAR(error(BitWidth::k2, Solver::kJoint), 0.3254, 0.0032);
  EXPECT_NEAR(error(BitWidth::k1, Solver::kJoint), 0.589, 0.006);
}

TEST(QuantizerTest, StatsMatchTheDequantizedMatrix) {
  const RowMajorMatrix W = gaussian(33, 200);
  for (Balance balance : {Balance::kNone, Balance::kSinkhorn}) {
    LayerConfig config = plain(BitWidth::k3);
    config.balance = balance;
    QuantizeStats stats;
    QuantizeOptions options;
    options.stats = &stats;
    const RowMajorMatrix d = W - dequantize_matrix(quantize(W, config, options));
    EXPECT_NEAR(stats.mean_abs_error, d.cwiseAbs().mean(), 1e-5);
    EXPECT_NEAR(stats.rms_error, std::sqrt(d.squaredNorm() / static_cast<float>(d.size())), 1e-5);
    EXPECT_NEAR(stats.max_abs_error, d.cwiseAbs().maxCoeff(), 1e-5);
    EXPECT_NEAR(stats.relative_error, d.norm() / W.norm(), 1e-5);
  }
}

struct Case {
  BitWidth nbits;
  int axis;
  std::optional<std::int64_t> group_size;
  Solver solver;
  Balance balance;
  bool quant_meta;
  bool importance;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (BitWidth nbits : kAllBitWidths) {
    for (int axis : {0, 1}) {
      for (std::optional<std::int64_t> group :
           {std::optional<std::int64_t>(64), std::optional<std::int64_t>(24),
            std::optional<std::int64_t>()}) {
        for (Solver solver : {Solver::kMinMax, Solver::kHqq, Solver::kJoint}) {
          const bool odd = all.size() % 2 == 1;
          all.push_back({nbits, axis, group, solver,
                         all.size() % 3 == 0 ? Balance::kSinkhorn : Balance::kNone,
                         all.size() % 5 == 0, odd});
        }
      }
    }
  }
  return all;
}

TEST(TargetTest, EveryTargetAndThreadCountGivesTheSameBytes) {
  const RowMajorMatrix W = gaussian(45, 188);
  std::vector<float> importance(static_cast<std::size_t>(W.cols()));
  for (std::size_t i = 0; i < importance.size(); ++i) {
    importance[i] = static_cast<float>(i % 7) + 0.25f;
  }
  const std::string original = cpu::current_target();
  for (const Case& c : cases()) {
    LayerConfig config = plain(c.nbits, c.solver);
    config.axis = c.axis;
    config.group_size = c.group_size;
    config.balance = c.balance;
    config.quant_scale = config.quant_zero = c.quant_meta;
    QuantizeOptions options;
    if (c.importance) options.importance = importance;
    cpu::set_target("scalar");
    options.threads = 1;
    const QuantizedTensor expected = quantize(W, config, options);
    const Tensor dense = dequantize(expected, {DType::kF32, 1});
    for (const std::string& target : cpu::supported_targets()) {
      cpu::set_target(target);
      for (int threads : {1, 2, 5}) {
        options.threads = threads;
        const QuantizedTensor q = quantize(W, config, options);
        ASSERT_EQ(bytes_of(q), bytes_of(expected))
            << target << ", " << threads << " threads, nbits " << nbits_of(c.nbits) << ", axis "
            << c.axis << ", solver " << to_string(c.solver) << ", balance " << to_string(c.balance);
        const Tensor other = dequantize(q, {DType::kF32, threads});
        ASSERT_EQ(std::memcmp(dense.buffer.data, other.buffer.data, dense.nbytes()), 0) << target;
      }
    }
  }
  cpu::set_target(original);
}

TEST(TargetTest, LpNormIsTheSameOnEveryTarget) {
  const RowMajorMatrix W = gaussian(16, 128);
  LayerConfig config = plain(BitWidth::k2);
  config.lp_norm = 0.7;
  const std::string original = cpu::current_target();
  cpu::set_target("scalar");
  const auto expected = bytes_of(quantize(W, config));
  for (const std::string& target : cpu::supported_targets()) {
    cpu::set_target(target);
    EXPECT_EQ(bytes_of(quantize(W, config)), expected) << target;
  }
  cpu::set_target(original);
  EXPECT_THAT([] { cpu::set_target("MMX"); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("target 'MMX' is not supported")));
}

TEST(DTypeTest, SixteenBitInputEqualsItsFloat32Values) {
  const RowMajorMatrix W = gaussian(20, 72);
  for (DType dtype : {DType::kF16, DType::kBF16, DType::kF64}) {
    Tensor input = Tensor::allocate(dtype, {W.rows(), W.cols()});
    RowMajorMatrix values(W.rows(), W.cols());
    for (Eigen::Index i = 0; i < W.size(); ++i) {
      using namespace core::scalar;  // NOLINT
      if (dtype == DType::kF64) {
        input.data<double>()[i] = static_cast<double>(W.data()[i]) + 1e-12;
        values.data()[i] = W.data()[i];
      } else {
        const bool half = dtype == DType::kF16;
        const std::uint16_t bits =
            half ? f32_to_f16_bits(W.data()[i]) : f32_to_bf16_bits(W.data()[i]);
        input.data<std::uint16_t>()[i] = bits;
        values.data()[i] = half ? f16_bits_to_f32(bits) : bf16_bits_to_f32(bits);
      }
    }
    const Quantizer quantizer{HqqConfig(plain())};
    EXPECT_EQ(bytes_of(quantizer.quantize(TensorView(input))), bytes_of(quantizer.quantize(values)))
        << dtype_name(dtype);
  }
}

TEST(StrideTest, RowsMayBeApart) {
  const RowMajorMatrix wide = gaussian(20, 100);
  const RowMajorMatrix W = wide.leftCols(72);
  for (int axis : {0, 1}) {
    LayerConfig config = plain();
    config.axis = axis;
    config.group_size = 8;
    const Quantizer quantizer{HqqConfig(config)};
    EXPECT_EQ(bytes_of(quantizer.quantize(wide.leftCols(72))), bytes_of(quantizer.quantize(W)));
  }
}

// The error of every group, in the solver's norm, is at most that of minmax.
TEST(NeverWorseTest, JointAgainstMinMaxGroupByGroup) {
  std::mt19937 rng(5);
  std::student_t_distribution<float> heavy(2.0f);
  RowMajorMatrix W(64, 256);
  for (Eigen::Index i = 0; i < W.size(); ++i) W.data()[i] = heavy(rng) * 0.02f;
  W.row(0).setConstant(0.25f);
  W.row(1).setZero();
  W.row(2).array() += 100.0f;
  W(3, 7) = 5000.0f;
  for (BitWidth nbits : kAllBitWidths) {
    for (DType meta : {DType::kF16, DType::kBF16, DType::kF32}) {
      LayerConfig config = plain(nbits);
      config.meta_dtype = meta;
      const RowMajorMatrix joint = W - dequantize_matrix(quantize(W, config));
      config.solver = Solver::kMinMax;
      const RowMajorMatrix minmax = W - dequantize_matrix(quantize(W, config));
      for (Eigen::Index r = 0; r < W.rows(); ++r) {
        for (Eigen::Index g = 0; g < 4; ++g) {
          const double e = joint.row(r).segment(g * 64, 64).cast<double>().squaredNorm();
          const double base = minmax.row(r).segment(g * 64, 64).cast<double>().squaredNorm();
          ASSERT_LE(e, base * (1 + 1e-5))
              << nbits_of(nbits) << " bits, row " << r << ", group " << g;
        }
      }
    }
  }
}

TEST(DegenerateTest, GroupLargerThanTheRowIsOneShortGroup) {
  const RowMajorMatrix W = gaussian(8, 40);
  LayerConfig whole = plain();
  whole.group_size = std::nullopt;
  for (std::int64_t group_size : {std::int64_t{64}, std::int64_t{1} << 40, std::int64_t{1} << 62}) {
    LayerConfig large = plain();
    large.group_size = group_size;
    EXPECT_EQ(bytes_of(quantize(W, large)), bytes_of(quantize(W, whole))) << group_size;
    large.axis = 0;
    EXPECT_EQ(quantize(W, large).scale.numel(), group_size == 64 ? 5 : 1);
  }
}

TEST(RefusalTest, NanAndInfAreCountedAndNamed) {
  RowMajorMatrix W = gaussian(40, 64);
  W(17, 33) = std::numeric_limits<float>::quiet_NaN();
  W(39, 2) = -std::numeric_limits<float>::infinity();
  EXPECT_THAT([&] { Quantizer(HqqConfig()).quantize(W, "mlp.up_proj"); },
              ThrowsMessage<std::invalid_argument>(testing::AllOf(
                  HasSubstr("[mlp.up_proj]"), HasSubstr("2 values"), HasSubstr("[17, 33]"))));
}

TEST(RefusalTest, WrongInputsSayWhatIsRight) {
  const Quantizer quantizer;
  const RowMajorMatrix W = gaussian(8, 64);
  EXPECT_THAT([&] { quantizer.quantize(RowMajorMatrix(0, 64)); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("[0, 64]")));
  EXPECT_THAT([&] { quantizer.quantize(TensorView(W.data(), DType::kI32, 8, 64)); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("W is int32")));
  EXPECT_THAT([&] { quantizer.quantize(TensorView(W.data(), DType::kF32, 8, 64, 63)); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("row_stride 63")));
  EXPECT_THAT([&] { quantizer.quantize(W, "lm_head"); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("leaves this layer unquantized")));
  QuantizeOptions options;
  std::vector<float> importance(63, 1.0f);
  options.importance = importance;
  EXPECT_THAT([&] { quantizer.quantize(W, "", options); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("63 values; W has 64 columns")));
  importance.assign(64, 0.0f);
  options.importance = importance;
  EXPECT_THAT([&] { quantizer.quantize(W, "", options); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("all zeros")));
  importance[9] = -1.0f;
  EXPECT_THAT([&] { quantizer.quantize(W, "", options); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("importance[9]")));
  options = {};
  options.threads = -1;
  EXPECT_THAT([&] { quantizer.quantize(W, "", options); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("threads is -1")));
  EXPECT_THROW(Quantizer({}, Device::cuda(999)).quantize(W), CudaError);
}

TEST(ImportanceTest, LowersTheWeightedError) {
  const RowMajorMatrix W = gaussian(128, 256);
  std::vector<float> importance(256);
  std::mt19937 rng(3);
  std::lognormal_distribution<float> wild(0.0f, 2.0f);
  for (float& h : importance) h = wild(rng);
  const Eigen::Map<const Eigen::RowVectorXf> h(importance.data(), 256);
  const auto weighted_error = [&](const QuantizedTensor& q) {
    const RowMajorMatrix d = W - dequantize_matrix(q);
    return (d.array().square().rowwise() * h.array()).sum();
  };
  for (int axis : {0, 1}) {
    for (BitWidth nbits : {BitWidth::k4, BitWidth::k2}) {
      LayerConfig config = plain(nbits);
      config.axis = axis;
      QuantizeOptions options;
      const float without = weighted_error(quantize(W, config, options));
      options.importance = importance;
      const float with = weighted_error(quantize(W, config, options));
      // Axis 0: all weights of a group share a column, so importance cannot matter there.
      if (axis == 1) {
        EXPECT_LT(with, 0.8f * without);
      } else {
        EXPECT_NEAR(with / without, 1.0f, 0.01f);
      }
      // Only ratios matter (a power of two is exact).
      std::vector<float> scaled = importance;
      for (float& x : scaled) x *= 8.0f;
      QuantizeOptions scaled_options;
      scaled_options.importance = scaled;
      EXPECT_EQ(bytes_of(quantize(W, config, options)),
                bytes_of(quantize(W, config, scaled_options)));
    }
  }
}

TEST(BalanceTest, RemovesColumnScales) {
  RowMajorMatrix W = gaussian(256, 256);
  for (Eigen::Index c = 0; c < W.cols(); ++c) W.col(c) *= std::exp2(static_cast<float>(c % 5));
  LayerConfig config = plain();
  const auto relative = [&](const QuantizedTensor& q) {
    // Error of every column relative to its size: what a column scale is for.
    const RowMajorMatrix d = W - dequantize_matrix(q);
    return (d.colwise().norm().array() / W.colwise().norm().array()).mean();
  };
  const float without = relative(quantize(W, config));
  config.balance = Balance::kSinkhorn;
  const QuantizedTensor q = quantize(W, config);
  EXPECT_LT(relative(q), 0.6f * without);
  EXPECT_EQ(q.col_scale.shape, (std::vector<std::int64_t>{256}));
}

TEST(MetadataTest, EightBitMetadataCostsNoAccuracy) {
  const RowMajorMatrix W = gaussian(256, 1024);
  LayerConfig config = plain();
  const QuantizedTensor wide = quantize(W, config);
  config.quant_scale = config.quant_zero = true;
  const QuantizedTensor narrow = quantize(W, config);
  EXPECT_NEAR(rms(W, dequantize_matrix(narrow)), rms(W, dequantize_matrix(wide)), 2e-4);
  EXPECT_NEAR(wide.bits_per_weight(), 4.5, 1e-9);
  EXPECT_NEAR(narrow.bits_per_weight(), 4.25 + 128.0 / 128 / 64, 1e-9);
}

TEST(ValidateTest, NamesTheTensorThatDoesNotFit) {
  QuantizedTensor q = quantize(gaussian(8, 64), plain());
  q.validate("x");
  QuantizedTensor wrong = q;
  wrong.scale.shape = {4, 2};
  EXPECT_THAT(
      [&] { dequantize(wrong); },
      ThrowsMessage<FormatError>(HasSubstr("scale is float16 [4, 2]; it must be float16 [8, 1]")));
  wrong = q;
  wrong.zero = Tensor();
  EXPECT_THAT([&] { wrong.validate("x"); },
              ThrowsMessage<FormatError>(HasSubstr("zero is missing")));
  wrong = q;
  wrong.col_scale = q.scale;
  EXPECT_THROW(wrong.validate("x"), FormatError);
}

}  // namespace
}  // namespace hqq

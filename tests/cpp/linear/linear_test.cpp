// hqq::linear against the product in double, for every kernel of this machine (linear_bound.hpp
// says how close it must be).
#include "hqq/linear.hpp"

#include <gtest/gtest.h>

#include <deque>
#include <limits>
#include <sstream>

#include "hqq/eigen.hpp"
#include "tests/cpp/support/linear_bound.hpp"
#include "tests/cpp/support/linear_test_util.hpp"

namespace hqq {
namespace {

using namespace hqq::testing;  // NOLINT

// Moves a buffer to where reading past its end, or before its begin, is noticed.
void guard(Tensor& tensor, Guard side) {
  if (!tensor) return;
  const auto memory = guarded_memory(tensor.nbytes(), side);
  std::memcpy(memory.get(), tensor.buffer.data, tensor.nbytes());
  tensor.buffer = {memory, memory.get(), tensor.nbytes()};
}
template <class Weight>
void guard_all(Weight& weight, Guard side) {
  for (const auto& [name, tensor] : weight.fields()) guard(*tensor, side);
}

template <class Weight>
std::vector<std::byte> product(const TensorView& x, const Weight& q, std::span<const float> bias,
                               const LinearOptions& options) {
  const std::size_t size = static_cast<std::size_t>(x.rows * q.out_features) * dtype_size(x.dtype);
  const auto y = guarded_memory(size, Guard::kAfter);
  linear(x, q, bias, y.get(), options);
  return {y.get(), y.get() + size};
}

std::vector<float> random_bias(Rng& rng, std::int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> bias(static_cast<std::size_t>(count));
  for (float& b : bias) b = normal(rng);
  return bias;
}

// A layer and an input, which the product in double is compared with for tiles and for format 1;
// these two must agree bit for bit. All memory is guarded.
void check_product(const LayerSpec& spec, std::int64_t rows, LinearMode mode, Rng& rng) {
  const Guard side = one_of(rng, {Guard::kBefore, Guard::kAfter});
  QuantizedTensor q = random_layer(spec, rng);
  Matrix x(one_of(rng, {DType::kF32, DType::kF16, DType::kBF16, DType::kF64}), rows,
           spec.in_features, one_of<std::int64_t>(rng, {0, 0, 1, 5, 32}), side);
  fill_rows(rng, x);
  std::vector<float> bias;
  if (rng() % 2 == 0) bias = random_bias(rng, spec.out_features);
  std::ostringstream what;
  what << cpu::current_target() << ", " << to_string(mode) << ", " << spec << ", x "
       << dtype_name(x.view.dtype) << " [" << rows << ", " << spec.in_features << "] row_stride "
       << x.view.row_stride << (bias.empty() ? "" : ", bias");
  SCOPED_TRACE(what.str());

  const auto guarded_bias = guarded_memory(bias.size() * sizeof(float), Guard::kAfter);
  const std::span<float> b(reinterpret_cast<float*>(guarded_bias.get()), bias.size());
  std::copy(bias.begin(), bias.end(), b.begin());
  const LinearOptions options{mode, static_cast<int>(uniform(rng, 1, 4))};
  guard_all(q, side);
  const std::vector<std::byte> y = product(x.view, q, b, options);
  if (can_tile(q.config, q.out_features, q.in_features)) {
    TiledTensor tiled = tile(q, {1});
    guard_all(tiled, side);
    ASSERT_EQ(product(x.view, tiled, b, options), y) << "tiles and format 1 differ";
  } else {
    mode = LinearMode::kExact;  // without tiles there is no other
  }
  expect_near(expected_linear(DenseLayer(q), x, b, mode), x.view.dtype, y.data());
}

void choose_metadata(LayerSpec& spec, Rng& rng) {
  spec.meta_dtype = one_of(rng, {DType::kF16, DType::kBF16, DType::kF32});
  spec.quant_scale = rng() % 4 == 0;
  spec.quant_zero = rng() % 4 == 0;
  spec.col_scale = rng() % 2 == 0;
}

// What the kernels that unpack codes as they use them take: whole units a block, few rows of x.
LayerSpec decodable(int axis, Rng& rng) {
  LayerSpec spec;
  spec.axis = axis;
  if (axis == 1) {
    spec.group_size =
        one_of<std::optional<std::int64_t>>(rng, {32, 64, 96, 128, 256, std::nullopt});
    spec.out_features = uniform(rng, 1, 257);
  } else {
    spec.group_size = one_of<std::optional<std::int64_t>>(rng, {16, 48, 64, std::nullopt});
    spec.out_features = spec.group_size.value_or(16) * uniform(rng, 1, 4);
  }
  spec.in_features = uniform(rng, 32, rng() % 8 == 0 ? 4160 : 500);
  return spec;
}

// What needs panels: many rows of x, or any group_size.
LayerSpec any_layer(int axis, Rng& rng) {
  LayerSpec spec = decodable(axis, rng);
  if (axis == 1 && rng() % 2 == 0) spec.group_size = 8 * uniform(rng, 1, 20);
  return spec;
}

class LinearOnTargetTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { cpu::set_target(GetParam()); }

 private:
  TargetGuard guard_;
};
INSTANTIATE_TEST_SUITE_P(Targets, LinearOnTargetTest, ::testing::ValuesIn(cpu::supported_targets()),
                         [](const auto& info) { return info.param; });

TEST_P(LinearOnTargetTest, FewRowsAreTheProductInDouble) {
  Rng rng(1);
  for (BitWidth nbits : kAllBitWidths) {
    for (LinearMode mode : {LinearMode::kFast, LinearMode::kExact}) {
      for (int axis : {0, 1}) {
        for (std::int64_t rows = 1; rows <= 5; ++rows) {
          LayerSpec spec = decodable(axis, rng);
          spec.nbits = nbits;
          choose_metadata(spec, rng);
          check_product(spec, rows, mode, rng);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(LinearOnTargetTest, ManyRowsAndAnyGroupSizeAreTheProductInDouble) {
  Rng rng(2);
  for (BitWidth nbits : kAllBitWidths) {
    for (LinearMode mode : {LinearMode::kFast, LinearMode::kExact}) {
      for (int axis : {0, 1}) {
        for (int repeat = 0; repeat < 6; ++repeat) {
          LayerSpec spec = any_layer(axis, rng);
          spec.nbits = nbits;
          choose_metadata(spec, rng);
          const std::int64_t most = 600000 / (spec.in_features * spec.out_features) + 1;
          const std::int64_t rows = repeat < 4 ? uniform(rng, 1, 13) : uniform(rng, 5, 200);
          check_product(spec, std::min(rows, most + 8), mode, rng);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

// Every group_size that is a multiple of 8, with tails of groups, units and blocks.
TEST_P(LinearOnTargetTest, EveryGroupSizeIsTheProductInDouble) {
  Rng rng(3);
  for (std::int64_t group_size = 8; group_size <= 264; group_size += 8) {
    for (std::int64_t rows : {1, 3, 7}) {
      LayerSpec spec;
      spec.nbits = kAllBitWidths[uniform(rng, 0, 7)];
      spec.group_size = group_size;
      spec.out_features = uniform(rng, 1, 40);
      spec.in_features = group_size + uniform(rng, 1, 300);
      choose_metadata(spec, rng);
      check_product(spec, rows, one_of(rng, {LinearMode::kFast, LinearMode::kExact}), rng);
      if (HasFatalFailure()) return;
    }
  }
}

// x is taken some hundred rows at a time, with axis 0 fewer.
TEST_P(LinearOnTargetTest, MoreRowsThanArePreparedAtATime) {
  Rng rng(4);
  for (LinearMode mode : {LinearMode::kFast, LinearMode::kExact}) {
    LayerSpec spec;
    spec.group_size = 32;
    spec.out_features = 17;
    spec.in_features = 72;
    check_product(spec, 1030, mode, rng);
    spec.axis = 0;
    spec.out_features = spec.group_size.value() * 2;
    check_product(spec, 131, mode, rng);
  }
}

// Axis 0 where groups do not fill tiles: any group_size, and rows that it does not divide.
TEST_P(LinearOnTargetTest, LayersWithoutTilesAreTheProductInDouble) {
  Rng rng(5);
  for (BitWidth nbits : kAllBitWidths) {
    for (std::int64_t group_size : {8, 24, 64}) {
      LayerSpec spec;
      spec.nbits = nbits;
      spec.axis = 0;
      spec.group_size = group_size;
      spec.out_features = 16 * uniform(rng, 1, 4) + 3;
      spec.in_features = uniform(rng, 32, 200);
      choose_metadata(spec, rng);
      check_product(spec, uniform(rng, 1, 9), one_of(rng, {LinearMode::kFast, LinearMode::kExact}),
                    rng);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(LinearOnTargetTest, ThreadsDoNotChangeABit) {
  Rng rng(6);
  for (int axis : {0, 1}) {
    for (LinearMode mode : {LinearMode::kFast, LinearMode::kExact}) {
      for (std::int64_t rows : {1, 4, 37}) {
        LayerSpec spec;
        spec.axis = axis;
        spec.group_size = 32;
        spec.out_features = axis == 0 ? 192 : 201;
        spec.in_features = 200;
        const TiledTensor q = tile(random_layer(spec, rng));
        Matrix x(DType::kF32, rows, spec.in_features);
        fill_rows(rng, x);
        const std::vector<std::byte> y = product(x.view, q, {}, {mode, 1});
        for (int threads = 2; threads <= 8; ++threads) {
          EXPECT_EQ(product(x.view, q, {}, {mode, threads}), y) << threads << " threads";
        }
      }
    }
  }
}

// The type of x changes how its values are stored, nothing else.
TEST_P(LinearOnTargetTest, SixteenBitInputIsItsFloat32ValuesRoundedOnce) {
  Rng rng(7);
  LayerSpec spec;
  spec.out_features = 40;
  spec.in_features = 136;
  const TiledTensor q = tile(random_layer(spec, rng));
  for (LinearMode mode : {LinearMode::kFast, LinearMode::kExact}) {
    for (DType dtype : {DType::kF16, DType::kBF16}) {
      for (std::int64_t rows : {1, 6}) {
        Matrix narrow(dtype, rows, spec.in_features, 3);
        fill_rows(rng, narrow);
        Matrix wide(DType::kF32, rows, spec.in_features);
        wide.values = narrow.values;
        wide.store();
        const std::vector<std::byte> y = product(wide.view, q, {}, {mode, 1});
        std::vector<std::byte> rounded(y.size() / 2);
        write_values({reinterpret_cast<const float*>(y.data()), y.size() / 4}, dtype,
                     rounded.data());
        EXPECT_EQ(product(narrow.view, q, {}, {mode, 1}), rounded) << dtype_name(dtype);
      }
    }
  }
}

// NaN and Inf make their row of y NaN or Inf, and no other.
TEST_P(LinearOnTargetTest, NanAndInfReachTheirRow) {
  Rng rng(8);
  for (BitWidth nbits : kAllBitWidths) {
    for (int axis : {0, 1}) {
      for (LinearMode mode : {LinearMode::kFast, LinearMode::kExact}) {
        for (std::int64_t rows : {1, 4, 9}) {
          for (double bad :
               {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
                -std::numeric_limits<double>::infinity()}) {
            LayerSpec spec;
            spec.nbits = nbits;
            spec.axis = axis;
            spec.group_size = axis == 0 ? 16 : rows == 9 ? 40 : 64;
            spec.out_features = 32;
            spec.in_features = 100;
            QuantizedTensor layer = random_layer(spec, rng);
            fill(rng, 0.01f, 0.1f, layer.scale);  // 0 times Inf would be NaN in any case
            const TiledTensor q = tile(layer);
            Matrix x(DType::kF32, rows, spec.in_features);
            for (double& value : x.values) value = static_cast<double>(uniform(rng, -9, 9));
            x.store();
            const std::vector<std::byte> before = product(x.view, q, {}, {mode, 1});
            const std::int64_t row = uniform(rng, 0, rows - 1);
            x(row, uniform(rng, 0, spec.in_features - 1)) = bad;
            x.store();
            const std::vector<std::byte> after = product(x.view, q, {}, {mode, 1});
            const auto* was = reinterpret_cast<const float*>(before.data());
            const auto* is = reinterpret_cast<const float*>(after.data());
            for (std::int64_t i = 0; i < rows * spec.out_features; ++i) {
              if (i / spec.out_features == row) {
                ASSERT_FALSE(std::isfinite(is[i])) << spec << ", " << rows << " rows";
              } else {
                ASSERT_EQ(is[i], was[i]) << spec << ", " << rows << " rows";
              }
            }
          }
        }
      }
    }
  }
}

// The modes are two: fast is as far from the product as its documentation says.
TEST_P(LinearOnTargetTest, FastIsAboutSixThousandthsFromExact) {
  Rng rng(9);
  std::normal_distribution<double> normal;
  LayerSpec spec;
  spec.out_features = 96;
  spec.in_features = 1024;
  const TiledTensor q = tile(random_layer(spec, rng));
  for (std::int64_t rows : {1, 4, 16}) {
    Matrix x(DType::kF32, rows, spec.in_features);
    for (double& value : x.values) value = normal(rng);
    x.store();
    const Eigen::Map<const RowMajorMatrix> values(reinterpret_cast<float*>(x.memory.get()), rows,
                                                  spec.in_features);
    const RowMajorMatrix exact = linear(values, q, {}, {LinearMode::kExact, 1});
    const RowMajorMatrix fast = linear(values, q, {}, {LinearMode::kFast, 1});
    const float relative = (fast - exact).norm() / exact.norm();
    EXPECT_GT(relative, 0.003f) << rows;
    EXPECT_LT(relative, 0.009f) << rows;
  }
}

// Calls of all kinds at once, with rows of y that are apart.
TEST_P(LinearOnTargetTest, ManyCallsAreAsOneCallEach) {
  Rng rng(11);
  for (LinearMode mode : {LinearMode::kFast, LinearMode::kExact}) {
    std::deque<TiledTensor> layers;
    std::deque<Matrix> inputs, outputs;
    std::deque<std::vector<float>> biases;
    std::vector<LinearCall> calls;
    std::vector<std::vector<std::byte>> expected;
    for (std::int64_t rows : {1, 0, 4, 300, 5, 70, 2, 257}) {
      const int axis = static_cast<int>(rng() % 2);
      LayerSpec spec = any_layer(axis, rng);
      spec.out_features = axis == 0 ? 48 : 33;
      spec.group_size = axis == 0 ? 16 : 40;
      spec.in_features = uniform(rng, 32, 150);
      layers.push_back(tile(random_layer(spec, rng)));
      inputs.emplace_back(one_of(rng, {DType::kF32, DType::kF16}), rows, spec.in_features, 3);
      fill_rows(rng, inputs.back());
      biases.push_back(random_bias(rng, rows % 2 == 0 ? spec.out_features : 0));
      const std::int64_t padding = rows % 3;
      outputs.emplace_back(inputs.back().view.dtype, rows, spec.out_features, padding);
      calls.push_back({inputs.back().view, &layers.back(), biases.back(),
                       outputs.back().memory.get(),
                       padding == 0 ? 0 : spec.out_features + padding});
      expected.push_back(product(inputs.back().view, layers.back(), biases.back(), {mode, 1}));
    }
    for (int threads : {1, 3}) {
      linear(calls, {mode, threads});
      for (std::size_t i = 0; i < calls.size(); ++i) {
        const Matrix& y = outputs[i];
        const std::size_t row_bytes =
            static_cast<std::size_t>(y.view.cols) * dtype_size(y.view.dtype);
        for (std::int64_t m = 0; m < y.view.rows; ++m) {
          ASSERT_EQ(
              std::memcmp(y.at(m, 0), expected[i].data() + std::size_t(m) * row_bytes, row_bytes),
              0)
              << "call " << i << ", row " << m;
          for (std::int64_t k = y.view.cols; m + 1 < y.view.rows && k < y.view.row_stride; ++k) {
            float between;
            read_values(y.view.dtype, y.at(m, k), std::span(&between, 1));
            ASSERT_TRUE(std::isnan(between)) << "written between rows of y";
          }
        }
      }
    }
  }
  linear(std::span<const LinearCall>(), {LinearMode::kFast, 1});
}

}  // namespace
}  // namespace hqq

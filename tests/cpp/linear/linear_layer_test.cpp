// hqq::Linear on the CPU: the layer gives what the functions under it give. tests/cuda/host has the
// same on a GPU.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "hqq/error.hpp"
#include "hqq/linear.hpp"
#include "tests/cpp/support/linear_test_util.hpp"
#include "tests/cpp/support/message_of.hpp"

namespace hqq {
namespace {

using hqq::testing::fill_rows;
using hqq::testing::LayerSpec;
using hqq::testing::Matrix;
using hqq::testing::message_of;
using hqq::testing::random_layer;
using hqq::testing::Rng;
using ::testing::HasSubstr;

constexpr LayerSpec kSpec{BitWidth::k4, 1, 32, 48, 96};

std::vector<std::byte> bytes_of(const Tensor& tensor) {
  return {tensor.buffer.data, tensor.buffer.data + tensor.nbytes()};
}

void expect_same(const QuantizedTensor& a, const QuantizedTensor& b) {
  EXPECT_EQ(a.config, b.config);
  const auto left = a.tensors(), right = b.tensors();
  ASSERT_EQ(left.size(), right.size());
  for (std::size_t i = 0; i < left.size(); ++i) {
    EXPECT_EQ(bytes_of(*left[i].second), bytes_of(*right[i].second)) << left[i].first;
  }
}

std::vector<float> some_bias(std::int64_t count) {
  std::vector<float> bias(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < bias.size(); ++i) bias[i] = static_cast<float>(i) - 3.0f;
  return bias;
}

class EveryWidth : public ::testing::TestWithParam<std::tuple<BitWidth, int>> {};

TEST_P(EveryWidth, IsTheProductOfTheTiles) {
  const auto [nbits, axis] = GetParam();
  Rng rng(7);
  LayerSpec spec{nbits, axis, 16, 48, 96};
  spec.quant_zero = true;
  spec.col_scale = true;
  const QuantizedTensor q = random_layer(spec, rng);
  const std::vector<float> bias = some_bias(48);
  const Linear layer(q, {bias});
  Matrix x(DType::kF32, 3, 96);
  fill_rows(rng, x);
  std::vector<float> y(3 * 48), expected(3 * 48);
  layer(x.view, y.data());
  linear(x.view, tile(q), bias, expected.data());
  EXPECT_EQ(y, expected);
  expect_same(layer.quantized_tensor(), q);

  std::vector<float> dense(48 * 96), rows(2 * 96);
  layer.dequantize(DType::kF32, dense.data());
  const Tensor W_r = dequantize(q);
  EXPECT_EQ(std::memcmp(dense.data(), W_r.buffer.data, W_r.nbytes()), 0);
  layer.rows(std::vector<std::int64_t>{47, 0}, DType::kF32, rows.data());
  EXPECT_TRUE(std::equal(rows.begin(), rows.begin() + 96, dense.begin() + 47 * 96));
  EXPECT_TRUE(std::equal(rows.begin() + 96, rows.end(), dense.begin()));
}

INSTANTIATE_TEST_SUITE_P(All, EveryWidth,
                         ::testing::Combine(::testing::ValuesIn(kAllBitWidths),
                                            ::testing::Values(0, 1)));

TEST(LinearLayer, KnowsWhatItIs) {
  Rng rng(1);
  const QuantizedTensor q = random_layer(kSpec, rng);
  const Linear layer(q, {some_bias(48)});
  EXPECT_EQ(layer.out_features(), 48);
  EXPECT_EQ(layer.in_features(), 96);
  EXPECT_EQ(layer.config(), q.config);
  EXPECT_EQ(layer.device(), Device::cpu());
  EXPECT_EQ(layer.bias().size(), 48u);
  // Its codes are held once: nothing is padded here.
  EXPECT_EQ(layer.nbytes(), static_cast<std::size_t>(q.nbytes()) + 48 * sizeof(float));
}

TEST(LinearLayer, WithoutTilesKeepsFormat1) {
  Rng rng(2);
  const QuantizedTensor q = random_layer({BitWidth::k3, 0, 8, 24, 40}, rng);
  ASSERT_FALSE(can_tile(q.config, 24, 40));
  const Linear layer(q);
  Matrix x(DType::kF32, 2, 40);
  fill_rows(rng, x);
  std::vector<float> y(2 * 24), expected(2 * 24);
  layer(x.view, y.data());
  linear(x.view, q, {}, expected.data());
  EXPECT_EQ(y, expected);
  expect_same(layer.quantized_tensor(), q);
}

TEST(LinearLayer, Moves) {
  Rng rng(3);
  const QuantizedTensor q = random_layer(kSpec, rng);
  Linear first(q), second(random_layer({BitWidth::k2, 1, 8, 8, 8}, rng));
  second = std::move(first);
  EXPECT_EQ(second.out_features(), 48);
  const Linear third(std::move(second));
  expect_same(third.quantized_tensor(), q);
}

TEST(LinearLayer, TakesOptionsOfTheCall) {
  Rng rng(4);
  const QuantizedTensor q = random_layer(kSpec, rng);
  const Linear layer(q);
  Matrix x(DType::kF32, 2, 96);
  fill_rows(rng, x);
  std::vector<float> fast(2 * 48), exact(2 * 48), expected(2 * 48);
  layer(x.view, fast.data(), {LinearMode::kFast, 1});
  layer(x.view, exact.data(), {LinearMode::kExact, 2});
  linear(x.view, tile(q), {}, expected.data(), {LinearMode::kExact});
  EXPECT_EQ(exact, expected);
  EXPECT_NE(exact, fast);
}

TEST(LinearLayer, Refuses) {
  Rng rng(5);
  QuantizedTensor q = random_layer(kSpec, rng);
  EXPECT_THAT(message_of<std::invalid_argument>([&] { Linear(q, {{1.0f, 2.0f}}); }),
              HasSubstr("bias has 2 values; the layer has 48 outputs"));
  const Linear layer(q);
  std::vector<float> out(4 * 48);
  Matrix x(DType::kF32, 2, 95);
  EXPECT_THAT(message_of<std::invalid_argument>([&] { layer(x.view, out.data()); }),
              HasSubstr("x has 95 columns; the layer takes 96"));
  EXPECT_THAT(message_of<std::invalid_argument>([&] { layer.dequantize(DType::kU8, out.data()); }),
              HasSubstr("is not float32, float16, bfloat16 or float64"));
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [&] { layer.rows(std::vector<std::int64_t>{48}, DType::kF32, out.data()); }),
              HasSubstr("row 48 does not exist; W has 48 rows"));
  // Without CUDA, without a GPU, and on every machine with fewer.
  EXPECT_THAT(message_of<CudaError>([&] { Linear(q, {{}, Device::cuda(99)}); }),
              HasSubstr("[cuda] "));
  q.scale = Tensor();
  EXPECT_THAT(message_of<FormatError>([&] { Linear{q}; }), HasSubstr("scale"));
}

}  // namespace
}  // namespace hqq

// Dequantizing kernels against the CPU backend, byte for byte.
#include "cuda/dequantize.hpp"

#include <gtest/gtest.h>

#include <random>

#include "hqq/eigen.hpp"
#include "hqq/quantizer.hpp"
#include "tests/cuda/device_memory.hpp"

namespace hqq::cuda {
namespace {

struct Case {
  BitWidth width = BitWidth::k4;
  int axis = 1;
  std::int64_t rows = 24, cols = 200, group_size = 64;
  DType meta = DType::kF16;
  bool balance = true;
  bool quant_scale = false, quant_zero = false;
};

QuantizedTensor quantized(const Case& c) {
  std::mt19937 random(static_cast<unsigned>(c.rows * 1000 + c.cols));
  std::normal_distribution<float> normal;
  RowMajorMatrix W(c.rows, c.cols);
  for (Eigen::Index i = 0; i < W.size(); ++i) W.data()[i] = normal(random);
  LayerConfig config;
  config.nbits = c.width;
  config.axis = c.axis;
  config.group_size = c.group_size;
  config.meta_dtype = c.meta;
  config.balance = c.balance ? Balance::kSinkhorn : Balance::kNone;
  config.quant_scale = c.quant_scale;
  config.quant_zero = c.quant_zero;
  return Quantizer().quantize(TensorView(W.data(), DType::kF32, c.rows, c.cols, c.cols), config,
                              "w", {});
}

void expect_equal(const Case& c, DType type) {
  SCOPED_TRACE(testing::Message() << nbits_of(c.width) << " bits, axis " << c.axis << ", " << c.rows
                                  << " x " << c.cols << ", group " << c.group_size << ", "
                                  << dtype_name(type));
  const QuantizedTensor q = quantized(c);
  const Tensor expected = hqq::dequantize(q, {type});
  const DeviceCopy copy(q);
  const DeviceArray<std::byte> out(expected.buffer.size);
  dequantize(copy.matrix(), out.data(), type, nullptr);
  EXPECT_EQ(std::memcmp(out.data(), expected.buffer.data, expected.buffer.size), 0);

  // Rows in any order, one of them twice.
  const DeviceArray<std::int64_t> ids(std::vector<std::int64_t>{c.rows - 1, 0, 3, 3, c.rows / 2});
  const std::size_t row = expected.buffer.size / static_cast<std::size_t>(c.rows);
  const DeviceArray<std::byte> picked(ids.size() * row);
  dequantize_rows(copy.matrix(), ids.data(), static_cast<std::int64_t>(ids.size()), picked.data(),
                  type, nullptr);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    EXPECT_EQ(std::memcmp(picked.data() + i * row,
                          expected.buffer.data + static_cast<std::size_t>(ids[i]) * row, row),
              0);
  }
}

class Dequantize : public testing::TestWithParam<std::tuple<BitWidth, int>> {};

TEST_P(Dequantize, EqualsTheCpu) {
  const auto [width, axis] = GetParam();
  for (DType type : {DType::kF16, DType::kBF16, DType::kF32, DType::kF64}) {
    expect_equal({width, axis}, type);
  }
  // Tails of groups, blocks and octets; rows that start at odd addresses.
  expect_equal({width, axis, 17, 77, 16}, DType::kF16);
  expect_equal({width, axis, 17, 77, 16}, DType::kF32);
  expect_equal({width, axis, 9, 5, 8, DType::kBF16, false}, DType::kBF16);
  expect_equal({width, axis, 300, 40, 32, DType::kF32, false}, DType::kF16);
  // 8-bit metadata, more than one block of it.
  expect_equal({width, axis, 40, 256, 8, DType::kF16, true, true, true}, DType::kF16);
  expect_equal({width, axis, 40, 256, 8, DType::kF16, true, false, true}, DType::kBF16);
}

INSTANTIATE_TEST_SUITE_P(Widths, Dequantize,
                         testing::Combine(testing::ValuesIn(kAllBitWidths), testing::Values(0, 1)));

TEST(Dequantize, NothingToDo) {
  const QuantizedTensor q = quantized({});
  const DeviceCopy copy(q);
  EXPECT_NO_THROW(dequantize_rows(copy.matrix(), nullptr, 0, nullptr, DType::kF16, nullptr));
}

TEST(Dequantize, TooSmallABufferIsFound) {
  const QuantizedTensor q = quantized({});
  const DeviceCopy copy(q);
  const DeviceArray<float> out(static_cast<std::size_t>(q.out_features * q.in_features) - 1);
  EXPECT_ANY_THROW(dequantize(copy.matrix(), out.data(), DType::kF32, nullptr));
}

}  // namespace
}  // namespace hqq::cuda

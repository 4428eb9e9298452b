// The bytes of results are part of the interface: these hashes hold with every compiler,
// instruction set and number of threads. Weights come from integers, since std::normal_distribution
// differs between standard libraries.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "hqq/bitpack.hpp"
#include "hqq/eigen.hpp"
#include "hqq/quantizer.hpp"
#include "src/io/atomic_file.hpp"

namespace hqq {
namespace {

// A congruential generator and the sum of four of its values: near a normal distribution, and
// exact.
RowMajorMatrix weights(Eigen::Index rows, Eigen::Index cols) {
  std::uint32_t state = 12345;
  const auto next = [&] {
    state = state * 1664525u + 1013904223u;
    return static_cast<int>(state >> 16);
  };
  RowMajorMatrix W(rows, cols);
  for (Eigen::Index i = 0; i < W.size(); ++i) {
    int sum = -2 * 65535;
    for (int k = 0; k < 4; ++k) sum += next();
    W.data()[i] = static_cast<float>(sum) / 65536.0f;
  }
  return W;
}

// Of the results of all bit widths, one after the other, and what they dequantize to.
std::string hash_of(LayerConfig config, bool weighted = false) {
  // Rows and columns that fill neither the lanes nor the groups.
  const RowMajorMatrix W = weights(37, 200);
  std::vector<float> importance;
  for (int i = 0; weighted && i < W.cols(); ++i) {
    importance.push_back(static_cast<float>(1 + i * 7 % 13));
  }
  QuantizeOptions options;
  options.importance = importance;
  std::vector<std::byte> all;
  const auto append = [&](const Tensor& tensor) {
    all.insert(all.end(), tensor.buffer.data, tensor.buffer.data + tensor.buffer.size);
  };
  for (const BitWidth nbits : kAllBitWidths) {
    config.nbits = nbits;
    const QuantizedTensor q = Quantizer(HqqConfig(config)).quantize(W, "", options);
    for (const auto& [name, tensor] : q.tensors()) append(*tensor);
    append(dequantize(q));
  }
  return xxh3_hex(all);
}

LayerConfig settings(Solver solver, int axis = 1) {
  LayerConfig config;
  config.solver = solver;
  config.axis = axis;
  config.balance = Balance::kNone;
  return config;
}

TEST(GoldenBytesTest, MinMax) {
  EXPECT_EQ(hash_of(settings(Solver::kMinMax)), "1c99908c6b798b3f72c06dbf1b0fc4c9");
  EXPECT_EQ(hash_of(settings(Solver::kMinMax, 0)), "ec5eb35e46932b94f8e6050a167c89cc");
}

TEST(GoldenBytesTest, Hqq) {
  EXPECT_EQ(hash_of(settings(Solver::kHqq)), "b56e851a078054e2d153b2ecd5847c19");
  EXPECT_EQ(hash_of(settings(Solver::kHqq, 0)), "6915927bc3d12a9641e83b8616d3ae1d");
  LayerConfig growing = settings(Solver::kHqq);
  growing.grow_beta = true;
  EXPECT_EQ(hash_of(growing), "e399ff8e2cbad47381e2b13b8cc5d97d");
}

TEST(GoldenBytesTest, Joint) {
  EXPECT_EQ(hash_of(settings(Solver::kJoint)), "e1e3cd9dbbe8b11c7d258b36f3579836");
  EXPECT_EQ(hash_of(settings(Solver::kJoint, 0)), "967beaa3c2748b2bfc85e554d66ff21b");
  EXPECT_EQ(hash_of(settings(Solver::kJoint), true), "efb084ece447d26cdf11da5213b91d37");
  LayerConfig small_norm = settings(Solver::kJoint);
  small_norm.lp_norm = 0.7;
  small_norm.iterations = 3;
  small_norm.group_size = std::nullopt;
  EXPECT_EQ(hash_of(small_norm), "3f1edc7093436da71f959131b45eb763");
}

TEST(GoldenBytesTest, ColumnBalance) {
  LayerConfig config = settings(Solver::kJoint);
  config.balance = Balance::kSinkhorn;
  EXPECT_EQ(hash_of(config), "8484fbe0dfadafb568f74dc620a7de29");
}

TEST(GoldenBytesTest, Metadata) {
  LayerConfig config = settings(Solver::kJoint);
  config.meta_dtype = DType::kBF16;
  EXPECT_EQ(hash_of(config), "d5d8c0482f3fff11ac271b63db62753e");
  config.meta_dtype = DType::kF32;
  EXPECT_EQ(hash_of(config), "c427e1be9c3aba3191a0f7d6bae13e83");
  config.group_size = 32;
  config.quant_scale = config.quant_zero = true;
  EXPECT_EQ(hash_of(config), "28dc9b1c7240954e8c6f9d1fd1f2e60a");
}

}  // namespace
}  // namespace hqq

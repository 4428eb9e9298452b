// hqq::Linear on a GPU, for which the SIMT shim stands: the library is loaded as in a program.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "hqq/error.hpp"
#include "hqq/linear.hpp"
#include "src/cuda/handles.hpp"
#include "src/cuda/workspaces.hpp"
#include "tests/cpp/support/linear_test_util.hpp"
#include "tests/cpp/support/message_of.hpp"

namespace hqq {
namespace {

using hqq::testing::DenseLayer;
using hqq::testing::LayerSpec;
using hqq::testing::Matrix;
using hqq::testing::message_of;
using hqq::testing::random_layer;
using hqq::testing::Rng;
using ::testing::HasSubstr;

// Any address does for a stream of the shim.
void* const kStream = reinterpret_cast<void*>(5);

// Bytes in device memory.
class OnDevice {
 public:
  explicit OnDevice(std::size_t size) { memory_.reserve(size, "test"); }
  OnDevice(const void* from, std::size_t size) : OnDevice(size) {
    cuda::check(cuda::library().copy(data(), from, size, nullptr), "test");
  }
  void* data() const { return memory_.data(); }
  std::vector<std::byte> bytes() const {
    std::vector<std::byte> out(memory_.size());
    cuda::check(cuda::library().copy(out.data(), data(), out.size(), nullptr), "test");
    return out;
  }

 private:
  cuda::DeviceMemory memory_;
};

// The environment of the shim, which reads it in every call.
class WhileRecording {
 public:
  WhileRecording() { ::setenv("HQQ_SIMT_CAPTURING", "1", 1); }
  ~WhileRecording() { ::unsetenv("HQQ_SIMT_CAPTURING"); }
};

LinearLayerOptions on_gpu(std::vector<float> bias = {}) {
  return {std::move(bias), Device::cuda(0)};
}

void expect_same(const QuantizedTensor& a, const QuantizedTensor& b) {
  EXPECT_EQ(a.config, b.config);
  const auto left = a.tensors(), right = b.tensors();
  ASSERT_EQ(left.size(), right.size());
  for (std::size_t i = 0; i < left.size(); ++i) {
    const Tensor &x = *left[i].second, &y = *right[i].second;
    ASSERT_EQ(x.shape, y.shape) << left[i].first;
    EXPECT_EQ(std::memcmp(x.buffer.data, y.buffer.data, x.nbytes()), 0) << left[i].first;
  }
}

Matrix random_x(Rng& rng, DType type, std::int64_t rows, std::int64_t cols) {
  Matrix x(type, rows, cols);
  std::normal_distribution<double> normal;
  for (double& value : x.values) value = normal(rng);
  x.store();
  return x;
}

std::vector<float> product(const Linear& layer, const Matrix& x,
                           const LinearOptions& options = {}) {
  const OnDevice x_on_device(x.view.data, x.size);
  const auto rows = static_cast<std::size_t>(x.view.rows);
  const std::size_t count = rows * static_cast<std::size_t>(layer.out_features());
  const OnDevice y(count * 2);
  layer(TensorView(x_on_device.data(), x.view.dtype, x.view.rows, x.view.cols), y.data(), options);
  std::vector<float> values(count);
  read_values(x.view.dtype, y.bytes().data(), std::span(values));
  return values;
}

// How often the kernels round is docs/cuda-kernels.md; here a wrong order of the codes must show.
void expect_product(const QuantizedTensor& q, std::span<const float> bias, const Matrix& x,
                    const std::vector<float>& y) {
  const DenseLayer w(q);
  const double unit = x.view.dtype == DType::kF16 ? 0x1p-10 : 0x1p-7;
  for (std::int64_t m = 0; m < x.view.rows; ++m) {
    for (std::int64_t n = 0; n < w.rows; ++n) {
      double sum = 0, size = 0;
      for (std::int64_t k = 0; k < w.cols; ++k) {
        const auto i = static_cast<std::size_t>(n * w.cols + k);
        const double factor = x.values[static_cast<std::size_t>(m * w.cols + k)] *
                              w.c[static_cast<std::size_t>(k)] * w.s[i];
        sum += (w.q[i] - w.z[i]) * factor;
        size += (w.q[i] + std::abs(w.z[i])) * std::abs(factor);
      }
      if (!bias.empty()) sum += bias[static_cast<std::size_t>(n)];
      EXPECT_NEAR(y[static_cast<std::size_t>(m * w.rows + n)], sum,
                  unit * (4 * size / std::sqrt(w.cols) + std::abs(sum)) + 1e-2)
          << m << ", " << n;
    }
  }
}

class EveryWidth : public ::testing::TestWithParam<std::tuple<BitWidth, int>> {};

TEST_P(EveryWidth, MultipliesAndGivesFormat1Back) {
  const auto [nbits, axis] = GetParam();
  Rng rng(7);
  LayerSpec spec{nbits, axis, 32, 64, 136};
  spec.quant_zero = spec.col_scale = nbits == BitWidth::k4;
  const QuantizedTensor q = random_layer(spec, rng);
  std::vector<float> bias(64);
  for (std::size_t i = 0; i < bias.size(); ++i) bias[i] = 0.25f * static_cast<float>(i);
  const Linear layer(q, on_gpu(bias));
  for (DType type : {DType::kF16, DType::kBF16}) {
    for (std::int64_t rows : {1, 17}) {
      const Matrix x = random_x(rng, type, rows, 136);
      expect_product(q, bias, x, product(layer, x));
    }
  }
  expect_same(layer.quantized_tensor(), q);

  const Tensor W_r = dequantize(q);
  const OnDevice dense(W_r.nbytes());
  layer.dequantize(DType::kF32, dense.data());
  EXPECT_EQ(std::memcmp(dense.bytes().data(), W_r.buffer.data, W_r.nbytes()), 0);
  const std::vector<std::int64_t> ids = {63, 2};
  const OnDevice ids_on_device(ids.data(), 2 * sizeof(ids[0])), rows(2 * 136 * sizeof(float));
  layer.rows({static_cast<const std::int64_t*>(ids_on_device.data()), 2}, DType::kF32, rows.data());
  EXPECT_EQ(std::memcmp(rows.bytes().data(), W_r.data<float>() + 63 * 136, 136 * sizeof(float)), 0);
}

INSTANTIATE_TEST_SUITE_P(All, EveryWidth,
                         ::testing::Combine(::testing::ValuesIn(kAllBitWidths),
                                            ::testing::Values(0, 1)));

TEST(LinearOnGpu, TakesItsOwnSize) {
  Rng rng(1);
  const QuantizedTensor q = random_layer({BitWidth::k4, 1, 64, 256, 512}, rng);
  const Linear layer(q, on_gpu());
  // Every tensor once, on boundaries of 256 bytes.
  EXPECT_GE(layer.nbytes(), static_cast<std::size_t>(q.nbytes()));
  EXPECT_LE(layer.nbytes(), static_cast<std::size_t>(q.nbytes()) + q.tensors().size() * 256);
}

TEST(LinearOnGpu, MovesBetweenDevices) {
  Rng rng(2);
  const QuantizedTensor q = random_layer({BitWidth::k3, 1, 64, 40, 128}, rng);
  Linear layer(q);
  layer.to(Device::cuda(0));
  EXPECT_EQ(layer.device(), Device::cuda(0));
  const Matrix x = random_x(rng, DType::kF16, 2, 128);
  expect_product(q, {}, x, product(layer, x));
  Linear moved(std::move(layer));
  expect_product(q, {}, x, product(moved, x));
  moved.to(Device::cpu());
  EXPECT_EQ(moved.device(), Device::cpu());
  expect_same(moved.quantized_tensor(), q);
  EXPECT_THAT(message_of<CudaError>([&] { moved.to(Device::cuda(3)); }),
              HasSubstr("there is no device cuda:3"));
  EXPECT_EQ(moved.device(), Device::cpu());
  expect_same(moved.quantized_tensor(), q);
}

TEST(LinearOnGpu, WithoutAKernelStillDequantizes) {
  Rng rng(3);
  const QuantizedTensor q = random_layer({BitWidth::k4, 1, 8, 16, 64}, rng);
  const Linear layer(q, on_gpu());
  const Tensor W_r = dequantize(q);
  const OnDevice dense(W_r.nbytes());
  layer.dequantize(DType::kF32, dense.data());
  EXPECT_EQ(std::memcmp(dense.bytes().data(), W_r.buffer.data, W_r.nbytes()), 0);
  expect_same(layer.quantized_tensor(), q);
  const Matrix x = random_x(rng, DType::kF16, 1, 64);
  EXPECT_THAT(message_of<std::invalid_argument>([&] { product(layer, x); }),
              HasSubstr("no kernel of cuda:0 multiplies groups of 8 along axis 1"));
}

TEST(LinearOnGpu, Refuses) {
  Rng rng(4);
  const QuantizedTensor q = random_layer({BitWidth::k4, 1, 64, 32, 64}, rng);
  const Linear layer(q, on_gpu());
  EXPECT_THAT(
      message_of<std::invalid_argument>([&] { product(layer, random_x(rng, DType::kF32, 1, 64)); }),
      HasSubstr("x is float32; the kernels of cuda:0 take float16"));
  EXPECT_THAT(
      message_of<std::invalid_argument>([&] { product(layer, random_x(rng, DType::kF16, 1, 56)); }),
      HasSubstr("x has 56 columns; the layer takes 64"));
  EXPECT_THAT(message_of<CudaError>([&] { Linear(q, {{}, Device::cuda(1)}); }),
              HasSubstr("there is no device cuda:1"));
}

TEST(LinearOnGpu, TooLittleMemoryChangesNothing) {
  Rng rng(6);
  const QuantizedTensor q = random_layer({BitWidth::k4, 1, 64, 32, 64}, rng);
  Linear layer(q);
  ::setenv("HQQ_SIMT_MEMORY", "1000", 1);
  const std::string message = message_of<CudaError>([&] { layer.to(Device::cuda(0)); });
  ::unsetenv("HQQ_SIMT_MEMORY");
  EXPECT_THAT(message, HasSubstr("linear on cuda:0 needs"));
  EXPECT_EQ(layer.device(), Device::cpu());
  expect_same(layer.quantized_tensor(), q);
  layer.to(Device::cuda(0));
  expect_same(layer.quantized_tensor(), q);
}

// ---- Graphs and workspaces ---------------------------------------------------------------------

TEST(LinearOnGpu, RecordsAfterOneProduct) {
  Rng rng(5);
  const QuantizedTensor q = random_layer({BitWidth::k4, 1, 64, 32, 64}, rng);
  const Linear layer(q, on_gpu());
  const Matrix x = random_x(rng, DType::kF16, 1, 64);
  // No other test has used this stream; a workspace for graphs may be there.
  product(layer, x);
  const WhileRecording recording;
  expect_product(q, {}, x, product(layer, x, {.stream = kStream}));
}

cuda::Workspaces::Lease take(cuda::Workspaces& workspaces, std::size_t bytes, void* stream) {
  auto lease = workspaces.take({0, stream}, bytes);
  EXPECT_TRUE(lease.has_value());
  return std::move(*lease);
}

TEST(Workspaces, OneForEachStreamAndOneForGraphs) {
  constexpr std::size_t kLeast = cuda::Workspaces::kMinBytes;
  cuda::Workspaces workspaces;
  {
    const WhileRecording recording;
    EXPECT_FALSE(workspaces.take({0, kStream}, 10).has_value());
  }
  void* const small = take(workspaces, 10, nullptr).memory();
  EXPECT_EQ(take(workspaces, kLeast, nullptr).memory(), small);
  EXPECT_NE(take(workspaces, 10, kStream).memory(), small);
  // The default stream cannot record, whatever others do.
  void* const other_stream = reinterpret_cast<void*>(7);
  const WhileRecording recording;
  EXPECT_EQ(take(workspaces, 10, nullptr).memory(), small);
  const void* const of_graphs = take(workspaces, 10, other_stream).memory();
  EXPECT_NE(of_graphs, small);
  EXPECT_NE(of_graphs, take(workspaces, 10, kStream).memory());
  EXPECT_FALSE(workspaces.take({0, other_stream}, kLeast + 1).has_value());
}

TEST(Workspaces, StayWhereAGraphHoldsTheirAddress) {
  constexpr std::size_t kLeast = cuda::Workspaces::kMinBytes;
  cuda::Workspaces workspaces;
  auto* const first = static_cast<unsigned char*>(take(workspaces, 10, kStream).memory());
  {
    const WhileRecording recording;
    EXPECT_EQ(take(workspaces, 10, kStream).memory(), first);
  }
  const auto larger = take(workspaces, kLeast + 1, kStream);
  EXPECT_NE(larger.memory(), first);
  EXPECT_EQ(larger.bytes(), 2 * kLeast);
  // Still there, with counters that are zero.
  std::vector<unsigned char> counters(cuda::kCounterBytes, 1);
  ASSERT_EQ(cuda::library().copy(counters.data(), first, counters.size(), nullptr),
            cuda::Status::kOk);
  EXPECT_EQ(counters, std::vector<unsigned char>(cuda::kCounterBytes, 0));
}

TEST(Workspaces, ARefusalOfTheDeviceIsTold) {
  cuda::Workspaces workspaces;
  ::setenv("HQQ_SIMT_MEMORY", "1000", 1);
  const std::string message = message_of<CudaError>([&] { workspaces.take({0, nullptr}, 10); });
  ::unsetenv("HQQ_SIMT_MEMORY");
  EXPECT_THAT(message, HasSubstr("the workspace of linear needs"));
  take(workspaces, 10, nullptr);
}

}  // namespace
}  // namespace hqq

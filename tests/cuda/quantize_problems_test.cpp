// What the quantizing kernels report and refuse.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "cuda/runtime.hpp"
#include "tests/cuda/quantize_test_util.hpp"

namespace hqq::cuda_testing {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

TEST(CudaQuantizeTest, NonfiniteWeightsAreCounted) {
  std::vector<float> W = gaussian(7 * 40);
  W[2 * 40 + 9] = std::numeric_limits<float>::quiet_NaN();
  W[2 * 40 + 10] = std::numeric_limits<float>::infinity();
  W[6 * 40 + 39] = -std::numeric_limits<float>::infinity();
  // Solved and encoded by one kernel or by several, in shared memory or not, balanced or not.
  for (const auto& [group_size, solver, balance] :
       {std::tuple(8, Solver::kJoint, Balance::kNone), std::tuple(24, Solver::kHqq, Balance::kNone),
        std::tuple(8, Solver::kMinMax, Balance::kSinkhorn)}) {
    for (BitWidth nbits : {BitWidth::k4, BitWidth::k3}) {
      Case c{config_of(nbits, solver, group_size, 1), DType::kF32, 7, 40, 2};
      c.config.balance = balance;
      const Result result = on_gpu(stored(W, c), c);
      EXPECT_EQ(result.problems.nonfinite, 3u);
      EXPECT_EQ(result.problems.first_nonfinite, 2u * 40 + 9);
      EXPECT_THAT([&] { on_cpu(stored(W, c), c, nullptr); },
                  ThrowsMessage<std::invalid_argument>(HasSubstr("W holds 3 values")));
    }
  }
}

TEST(CudaQuantizeTest, WeightsThatOverflowFloatAreCounted) {
  const std::vector<double> W = {1.0, -2.0, 3e38, 1e39, 4.0, 0.5, 0.25, 1.0};
  std::vector<std::byte> bytes(W.size() * sizeof(double));
  std::memcpy(bytes.data(), W.data(), bytes.size());
  const Case c{config_of(BitWidth::k4, Solver::kMinMax, 8, 1), DType::kF64, 1, 8};
  const Result result = on_gpu(bytes, c);
  EXPECT_EQ(result.problems.nonfinite, 1u);
  EXPECT_EQ(result.problems.first_nonfinite, 3u);
}

TEST(CudaQuantizeTest, MetadataThatOverflowsIsReported) {
  std::vector<float> W = gaussian(4 * 32);
  W[2 * 32 + 20] = 3e7f;  // a scale of 2e6: beyond float16
  for (int group_size : {16, 32}) {
    for (bool quant_zero : {false, true}) {
      Case c{config_of(BitWidth::k4, Solver::kJoint, group_size, 1), DType::kF32, 4, 32};
      c.config.quant_zero = quant_zero;
      const Result result = on_gpu(stored(W, c), c);
      EXPECT_EQ(result.problems.nonfinite, 0u);
      EXPECT_EQ(result.problems.first_overflow, group_size == 16 ? 5u : 2u);
      EXPECT_THROW(on_cpu(stored(W, c), c, nullptr), std::invalid_argument);
    }
  }
}

TEST(CudaQuantizeTest, SmallScalesAreReported) {
  std::vector<float> W = gaussian(4 * 32);
  for (std::size_t i = 2 * 32 + 16; i < 3 * 32; ++i) W[i] *= 1e-9f;
  // Solved and stored by one kernel or by several.
  for (const bool quant_zero : {false, true}) {
    Case c{config_of(BitWidth::k4, Solver::kJoint, 16, 1), DType::kF32, 4, 32};
    c.config.quant_zero = quant_zero;
    EXPECT_EQ(on_gpu(stored(W, c), c).problems.first_small, 5u);
    EXPECT_NO_THROW(on_cpu(stored(W, c), c, nullptr));
    for (const auto& [meta_dtype, quant_scale] :
         {std::pair(DType::kBF16, false), std::pair(DType::kF32, false),
          std::pair(DType::kF16, true)}) {
      Case other = c;
      other.config.meta_dtype = meta_dtype;
      other.config.quant_scale = quant_scale;
      EXPECT_EQ(on_gpu(stored(W, other), other).problems.first_small, cuda::kNoProblem.first_small);
    }
  }
}

TEST(CudaQuantizeTest, SmallWorkspaceIsRefused) {
  cuda::QuantizeArgs args;
  args.out.layout = {8, 64, 64, 1};
  args.out.scale_type = DType::kU8;
  EXPECT_GT(cuda::quantize_workspace_bytes(args), 0u);
  EXPECT_THAT([&] { cuda::quantize(args, nullptr); },
              ThrowsMessage<cuda::Failure>(HasSubstr("the workspace has 0 bytes")));
}

}  // namespace
}  // namespace hqq::cuda_testing

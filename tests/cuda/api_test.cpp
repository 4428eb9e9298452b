// The table of functions that the library exports: statuses and texts.
#include "cuda/api.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/cuda/device_memory.hpp"

namespace hqq::cuda {
namespace {

using ::testing::HasSubstr;

DeviceMatrix matrix(Packing packing, std::int64_t group_size = 64) {
  DeviceMatrix q;
  q.layout = {32, 128, group_size, 1};
  q.packing = packing;
  return q;
}

// Sets a variable of the shim while it lives.
class ShimSetting {
 public:
  ShimSetting(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~ShimSetting() { unsetenv(name_); }

 private:
  const char* name_;
};

const Api& api() { return *hqq_cuda_api(); }

TEST(Api, TilesAreTheSizeOfTheCodes) {
  std::size_t bytes = 0;
  ASSERT_EQ(api().tiles_bytes(matrix(Packing::kFormat1), &bytes), Status::kOk);
  EXPECT_EQ(bytes, 32u * 128 / 2);
}

TEST(Api, TilesOfOtherLayoutsAreUnsupported) {
  std::size_t bytes = 0;
  ASSERT_EQ(api().tiles_bytes(matrix(Packing::kFormat1, 8), &bytes), Status::kUnsupported);
  EXPECT_THAT(api().error_text(), HasSubstr("groups of 8"));
}

TEST(Api, MaxRowsAndItsRefusals) {
  std::int64_t rows = 0;
  const DeviceMatrix q = matrix(Packing::kCudaTiles);
  EXPECT_EQ(api().max_rows(q, DType::kBF16, &rows), Status::kOk);
  EXPECT_GE(rows, 64);
  EXPECT_EQ(api().max_rows(q, DType::kF32, &rows), Status::kUnsupported);
  EXPECT_EQ(api().max_rows(matrix(Packing::kCudaTiles, 8), DType::kF16, &rows),
            Status::kUnsupported);
}

TEST(Api, LinearTakesTilesAlone) {
  LinearArgs args;
  args.weight = matrix(Packing::kFormat1);
  args.rows = 1;
  std::size_t bytes = 0;
  ASSERT_EQ(api().linear_workspace_bytes(args, &bytes), Status::kOk);
  args.workspace_bytes = bytes;
  EXPECT_EQ(api().linear(args, nullptr), Status::kInvalidCall);
  EXPECT_THAT(api().error_text(), HasSubstr("codes are in format 1; this call takes CUDA tiles"));
  args.weight.packing = Packing::kCudaTiles;
  args.x_type = DType::kF32;
  EXPECT_EQ(api().linear(args, nullptr), Status::kUnsupported);
  args.x_type = DType::kF16;
  args.weight.layout.group_size = 8;
  EXPECT_EQ(api().linear(args, nullptr), Status::kUnsupported);
  EXPECT_EQ(api().linear_workspace_bytes(args, &bytes), Status::kUnsupported);
}

TEST(Api, QuantizeWritesFormat1Alone) {
  QuantizeArgs args;
  args.out = matrix(Packing::kCudaTiles);
  EXPECT_EQ(api().quantize(args, nullptr), Status::kInvalidCall);
}

TEST(Api, IsCapturing) {
  bool capturing = true;
  EXPECT_EQ(api().is_capturing(nullptr, &capturing), Status::kOk);
  EXPECT_FALSE(capturing);
  {
    const ShimSetting recording("HQQ_SIMT_CAPTURING", "1");
    EXPECT_EQ(api().is_capturing(nullptr, &capturing), Status::kOk);
    EXPECT_TRUE(capturing);
  }
  const ShimSetting other("HQQ_SIMT_CAPTURING", "implicit");
  EXPECT_EQ(api().is_capturing(nullptr, &capturing), Status::kOk);
  EXPECT_FALSE(capturing) << "another stream is, the default stream cannot be";
}

}  // namespace
}  // namespace hqq::cuda

// hqq::linear: modes, the environment variable, and arguments that are refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "hqq/eigen.hpp"
#include "hqq/error.hpp"
#include "hqq/linear.hpp"
#include "hqq/quantizer.hpp"
#include "tests/cpp/support/linear_test_util.hpp"

namespace hqq {
namespace {

using namespace hqq::testing;  // NOLINT
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

class EnvironmentGuard {
 public:
  explicit EnvironmentGuard(const char* value) {
    if (const char* old = std::getenv(kName)) old_ = old;
    value == nullptr ? ::unsetenv(kName) : ::setenv(kName, value, 1);
  }
  ~EnvironmentGuard() { old_ ? ::setenv(kName, old_->c_str(), 1) : ::unsetenv(kName); }
  EnvironmentGuard(const EnvironmentGuard&) = delete;
  EnvironmentGuard& operator=(const EnvironmentGuard&) = delete;

 private:
  static constexpr const char* kName = "HQQ_CPU_MODE";
  std::optional<std::string> old_;
};

class LinearTest : public ::testing::Test {
 protected:
  LinearTest() : layer_(random_layer({.out_features = 24, .in_features = 64}, rng_)) {
    tiled_ = tile(layer_);
  }
  RowMajorMatrix input(Eigen::Index rows, Eigen::Index cols) {
    std::normal_distribution<float> normal;
    return RowMajorMatrix::NullaryExpr(rows, cols, [&] { return normal(rng_); });
  }

  Rng rng_{10};
  QuantizedTensor layer_;
  TiledTensor tiled_;
};

TEST_F(LinearTest, IsTheProductWithWhatTheQuantizerMade) {
  const RowMajorMatrix x = input(5, 100);
  const QuantizedTensor q = Quantizer().quantize(input(24, 100));
  const std::vector<float> bias(24, 0.5f);
  const RowMajorMatrix expected = ((x * dequantize_matrix(q).transpose()).array() + 0.5f).matrix();
  EXPECT_TRUE(linear(x, q, bias, {LinearMode::kExact}).isApprox(expected, 1e-6f));
  EXPECT_TRUE(linear(x, tile(q), bias, {LinearMode::kFast}).isApprox(expected, 1e-2f));
}

TEST_F(LinearTest, ModesHaveNames) {
  for (LinearMode mode : {LinearMode::kAuto, LinearMode::kFast, LinearMode::kExact}) {
    EXPECT_EQ(linear_mode_from_string(to_string(mode)), mode);
  }
  EXPECT_EQ(to_string(LinearMode::kAuto), "auto");
  for (const char* name : {"", "Fast", "int8"}) {
    EXPECT_THAT([&] { linear_mode_from_string(name); },
                ThrowsMessage<std::invalid_argument>(HasSubstr(
                    "mode is '" + std::string(name) + "'; it must be auto, fast or exact")));
  }
}

TEST_F(LinearTest, TheEnvironmentChoosesWhereTheCallerDoesNot) {
  const RowMajorMatrix x = input(3, 64);
  const RowMajorMatrix fast = linear(x, tiled_, {}, {LinearMode::kFast});
  const RowMajorMatrix exact = linear(x, tiled_, {}, {LinearMode::kExact});
  ASSERT_NE(fast, exact);
  for (const char* value : {static_cast<const char*>(nullptr), "", "fast", "exact"}) {
    const EnvironmentGuard environment(value);
    const bool says_exact = value != nullptr && std::string(value) == "exact";
    EXPECT_EQ(linear(x, tiled_), says_exact ? exact : fast);
    EXPECT_EQ(linear(x, layer_), says_exact ? exact : fast);
    EXPECT_EQ(linear(x, tiled_, {}, {LinearMode::kFast}), fast);
    EXPECT_EQ(linear(x, tiled_, {}, {LinearMode::kExact}), exact);
  }
  for (const char* value : {"auto", "EXACT", "1"}) {
    const EnvironmentGuard environment(value);
    EXPECT_THAT([&] { linear(x, tiled_); },
                ThrowsMessage<std::invalid_argument>(
                    HasSubstr("HQQ_CPU_MODE is '" + std::string(value) + "'; it must be fast or")));
    EXPECT_EQ(linear(x, tiled_, {}, {LinearMode::kExact}), exact);
  }
}

TEST_F(LinearTest, WrongSizesSayWhatIsRight) {
  const auto refused = [&](auto action, const std::string& message) {
    EXPECT_THAT(action, ThrowsMessage<std::invalid_argument>(HasSubstr(message)));
  };
  const RowMajorMatrix x = input(5, 64);
  refused([&] { linear(input(5, 63), tiled_); }, "x has 63 columns; the layer takes 64");
  refused([&] { linear(input(5, 65), layer_); }, "x has 65 columns; the layer takes 64");
  refused([&] { linear(x, tiled_, std::vector<float>(23)); },
          "bias has 23 values; the layer has 24 outputs");
  refused([&] { linear(x, tiled_, {}, {LinearMode::kFast, -1}); }, "threads is -1");
  RowMajorMatrix y(5, 24);
  refused([&] { linear(TensorView(x.data(), DType::kI32, 5, 64), tiled_, {}, y.data()); },
          "x is int32; it must be float32, float16, bfloat16 or float64");
  const LinearCall call{TensorView(x.data(), DType::kF32, 5, 64), &tiled_, {}, y.data(), 23};
  refused([&] { linear({&call, 1}); }, "y_stride is 23; a row of y has 24 values");
}

TEST_F(LinearTest, RowsOfXMayNotOverlap) {
  const RowMajorMatrix x = input(5, 64);
  RowMajorMatrix y(5, 24);
  EXPECT_THAT([&] { linear(TensorView(x.data(), DType::kF32, 5, 64, 63), tiled_, {}, y.data()); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("row_stride 63")));
}

TEST_F(LinearTest, ABrokenWeightIsRefused) {
  const RowMajorMatrix x = input(5, 64);
  TiledTensor tiled = tiled_;
  tiled.zero = Tensor();
  EXPECT_THAT([&] { linear(x, tiled); },
              ThrowsMessage<FormatError>(HasSubstr("the tiled zero is missing")));
  QuantizedTensor layer = layer_;
  layer.scale.shape = {24, 2};
  EXPECT_THROW(linear(x, layer), FormatError);
}

TEST_F(LinearTest, NoRowsGiveNoRows) {
  const RowMajorMatrix none(0, 64);
  EXPECT_EQ(linear(none, tiled_).rows(), 0);
  EXPECT_EQ(linear(none, layer_).cols(), 24);
  linear(TensorView(nullptr, DType::kF32, 0, 64), tiled_, {}, nullptr);
  EXPECT_THROW(linear(RowMajorMatrix(0, 63), tiled_), std::invalid_argument);
}

}  // namespace
}  // namespace hqq

// LayerConfig: the range of every field, and the names of solvers.
#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "hqq/config.hpp"
#include "tests/cpp/support/message_of.hpp"

namespace hqq {
namespace {

using testing::message_of;

TEST(LayerConfigTest, DefaultsAreValid) {
  const LayerConfig config;
  EXPECT_NO_THROW(config.validate());
  EXPECT_EQ(config.nbits, BitWidth::k4);
  EXPECT_EQ(config.group_size, 64);
  EXPECT_EQ(config.solver, Solver::kJoint);
}

TEST(LayerConfigTest, EdgesOfEveryRangeAreValid) {
  LayerConfig config;
  config.group_size = 8;
  config.axis = 0;
  config.lp_norm = 2.0;
  config.iterations = 1;
  config.beta = 1e-6;
  config.kappa = 1.0;
  config.meta_dtype = DType::kF32;
  EXPECT_NO_THROW(config.validate());
  config.group_size.reset();
  config.iterations = 1000;
  config.solver = Solver::kHqq;
  config.lp_norm = 1.0;
  config.meta_dtype = DType::kBF16;
  EXPECT_NO_THROW(config.validate());
}

struct BadField {
  void (*break_it)(LayerConfig&);
  std::string message;
};

class BadFieldTest : public ::testing::TestWithParam<BadField> {};

TEST_P(BadFieldTest, IsRefusedByName) {
  LayerConfig config;
  GetParam().break_it(config);
  EXPECT_EQ(message_of([&] { config.validate(); }), GetParam().message);
}

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

INSTANTIATE_TEST_SUITE_P(
    All, BadFieldTest,
    ::testing::Values(
        BadField{[](LayerConfig& c) { c.group_size = 0; },
                 "[config] group_size is 0; it must be a multiple of 8 from 8 up, or null for one "
                 "group per row"},
        BadField{[](LayerConfig& c) { c.group_size = 60; },
                 "[config] group_size is 60; it must be a multiple of 8 from 8 up, or null for one "
                 "group per row"},
        BadField{[](LayerConfig& c) { c.group_size = -8; },
                 "[config] group_size is -8; it must be a multiple of 8 from 8 up, or null for one "
                 "group per row"},
        BadField{[](LayerConfig& c) { c.axis = 2; }, "[config] axis is 2; it must be 0 or 1"},
        BadField{[](LayerConfig& c) { c.axis = -1; }, "[config] axis is -1; it must be 0 or 1"},
        BadField{[](LayerConfig& c) { c.lp_norm = 0; },
                 "[config] lp_norm is 0; it must be above 0 and at most 2 for solver joint"},
        BadField{[](LayerConfig& c) { c.lp_norm = 2.5; },
                 "[config] lp_norm is 2.5; it must be above 0 and at most 2 for solver joint"},
        BadField{[](LayerConfig& c) { c.lp_norm = kNaN; },
                 "[config] lp_norm is nan; it must be above 0 and at most 2 for solver joint"},
        BadField{[](LayerConfig& c) {
                   c.solver = Solver::kHqq;
                   c.lp_norm = 1.5;
                 },
                 "[config] lp_norm is 1.5; it must be above 0 and at most 1 for solver hqq"},
        BadField{[](LayerConfig& c) { c.iterations = 0; },
                 "[config] iterations is 0; it must be from 1 to 1000"},
        BadField{[](LayerConfig& c) { c.iterations = 1001; },
                 "[config] iterations is 1001; it must be from 1 to 1000"},
        BadField{[](LayerConfig& c) { c.beta = 0; },
                 "[config] beta is 0; it must be a finite number above 0"},
        BadField{[](LayerConfig& c) { c.beta = kInf; },
                 "[config] beta is inf; it must be a finite number above 0"},
        BadField{[](LayerConfig& c) { c.kappa = 0.5; },
                 "[config] kappa is 0.5; it must be a finite number, 1 or more"},
        BadField{[](LayerConfig& c) { c.kappa = kNaN; },
                 "[config] kappa is nan; it must be a finite number, 1 or more"},
        BadField{[](LayerConfig& c) { c.meta_dtype = DType::kI8; },
                 "[config] meta_dtype is int8; it must be float16, bfloat16 or float32"},
        BadField{[](LayerConfig& c) { c.nbits = static_cast<BitWidth>(77); },
                 "[config] nbits must be one of 8, 6, 5, 4, 3, 2, 1.58, 1"},
        BadField{[](LayerConfig& c) { c.solver = static_cast<Solver>(9); },
                 "[config] there is no solver number 9"},
        BadField{[](LayerConfig& c) { c.balance = static_cast<Balance>(9); },
                 "[config] there is no balance number 9"}));

TEST(SolverNameTest, AreTheWordsUsersWrite) {
  EXPECT_EQ(to_string(Solver::kMinMax), "minmax");
  EXPECT_EQ(to_string(Solver::kHqq), "hqq");
  EXPECT_EQ(to_string(Solver::kJoint), "joint");
  EXPECT_EQ(to_string(Balance::kAuto), "auto");
  EXPECT_EQ(to_string(Balance::kNone), "none");
  EXPECT_EQ(to_string(Balance::kSinkhorn), "sinkhorn");
}

}  // namespace
}  // namespace hqq

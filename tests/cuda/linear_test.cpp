// Linear kernels against products in double.
#include <gtest/gtest.h>

#include "hqq/core/codec.hpp"
#include "tests/cuda/linear_test_util.hpp"

namespace hqq::cuda {
namespace {

struct Product {
  LayerSpec spec;
  DType x_type = DType::kF16;
  std::int64_t M = 1;
  LinearKernel kernel = LinearKernel::kDecode8;
  int strips = 8, splits = 1;
  bool bias = false;
  std::int64_t x_padding = 0, x_offset = 0, y_padding = 0;
  std::vector<std::int64_t> row_begin{};  // experts; empty: a plain layer
  int parts = 1, part = 0;                // matrices an expert has, and the one that is multiplied
};

std::ostream& operator<<(std::ostream& out, const Product& p) {
  return out << p.spec << ", x " << dtype_name(p.x_type) << " [" << p.M << "], kernel "
             << static_cast<int>(p.kernel) << ", strips " << p.strips << ", splits " << p.splits
             << ", bias " << p.bias << ", experts " << p.row_begin.size();
}

// Of experts with `parts` matrices each, matrix `part`.
LinearArgs part_of(LinearArgs args, int parts, int part) {
  const auto step = [&](auto*& address, std::int64_t& stride) {
    using T = std::remove_reference_t<decltype(address)>;
    if (address != nullptr) {
      address = static_cast<T>(
          static_cast<void*>(static_cast<std::byte*>(static_cast<void*>(address)) + part * stride));
    }
    stride *= parts;
  };
  step(args.weight.W_q, args.strides.W_q);
  step(args.weight.scale, args.strides.scale);
  step(args.weight.zero, args.strides.zero);
  step(args.weight.scale_step, args.strides.scale_step);
  step(args.weight.scale_offset, args.strides.scale_offset);
  step(args.weight.zero_step, args.strides.zero_step);
  step(args.weight.zero_offset, args.strides.zero_offset);
  step(args.weight.col_scale, args.strides.col_scale);
  args.experts /= parts;
  return args;
}

std::vector<std::uint16_t> run(LinearArgs args, const HalfMatrix& y, const Product& p) {
  const LinearPlan plan = make_plan(args, p.kernel, p.strips, p.splits);
  args.workspace_bytes = linear_workspace_bytes(args, plan);
  const DeviceArray<std::byte> workspace(args.workspace_bytes);
  std::memset(workspace.data(), 0, kCounterBytes);
  args.workspace = workspace.data();
  linear(args, plan, nullptr);
  EXPECT_TRUE(y.margins_untouched());
  EXPECT_EQ(std::count(workspace.data(), workspace.data() + kCounterBytes, std::byte{0}),
            static_cast<std::ptrdiff_t>(kCounterBytes))
      << "the counters are zeros for the next call";
  return y.memory.values();
}

void expect_product(const Product& p, unsigned seed = 1) {
  SCOPED_TRACE(::testing::Message() << p);
  Rng rng(seed);
  const int experts = p.row_begin.empty() ? 1 : static_cast<int>(p.row_begin.size()) - 1;
  const PackedLayer layer(p.spec, experts * p.parts, rng);
  const std::int64_t N = p.spec.out_features, K = p.spec.in_features;
  HalfMatrix x(p.x_type, p.M, K, K + p.x_padding, p.x_offset);
  x.randomize(rng);
  HalfMatrix bias(p.x_type, experts, N, N);
  bias.randomize(rng);
  const HalfMatrix y(p.x_type, p.M, N, N + p.y_padding);

  LinearArgs args = part_of(layer.args(p.x_type), p.parts, p.part);
  args.x = x.data();
  args.x_stride = x.stride;
  args.rows = p.M;
  args.y = y.data();
  args.y_stride = y.stride;
  if (p.bias) args.bias = bias.data();
  const DeviceArray<std::int64_t> row_begin(p.row_begin.empty() ? std::vector<std::int64_t>{0}
                                                                : p.row_begin);
  if (!p.row_begin.empty()) args.row_begin = row_begin.data();
  const std::vector<std::uint16_t> bits = run(args, y, p);

  for (int e = 0; e < experts; ++e) {
    const std::int64_t begin = p.row_begin.empty() ? 0 : p.row_begin[static_cast<std::size_t>(e)];
    const std::int64_t end =
        p.row_begin.empty() ? p.M : p.row_begin[static_cast<std::size_t>(e) + 1];
    for (std::int64_t m = begin; m < end; ++m) {
      for (std::int64_t n = 0; n < N; ++n) {
        const Expected want =
            expected(layer.dense(static_cast<std::size_t>(e * p.parts + p.part)), p.spec.nbits, n,
                     x, m, p.kernel, p.bias ? bias.value(e, n) : 0.0);
        const double share = std::abs(y.value(m, n) - want.y) / want.error;
        if (!(share <= 1.0)) {  // NaN too
          ADD_FAILURE() << "y[" << m << ", " << n << "] is " << y.value(m, n) << ", not " << want.y
                        << " +- " << want.error;
          return;
        }
      }
    }
  }
  // The same bits again.
  EXPECT_EQ(run(args, y, p), bits);
}

class LinearWidths : public ::testing::TestWithParam<std::tuple<BitWidth, DType>> {};

TEST_P(LinearWidths, DecodesAxis1) {
  const auto [width, x_type] = GetParam();
  expect_product({shape(width, 1, 64, 80, 320), x_type, 1});
  expect_product({shape(width, 1, 48, 33, 200), x_type, 7, LinearKernel::kDecode8, 2, 2, true});
  expect_product({shape(width, 1, 32, 47, 576), x_type, 9, LinearKernel::kDecode16, 1, 2});
}

TEST_P(LinearWidths, MultipliesAxis1) {
  const auto [width, x_type] = GetParam();
  expect_product({shape(width, 1, 64, 80, 320), x_type, 17, LinearKernel::kGemm, 4});
  expect_product({shape(width, 1, 48, 33, 200), x_type, 7, LinearKernel::kGemm, 4, 2, true});
}

TEST_P(LinearWidths, Axis0) {
  const auto [width, x_type] = GetParam();
  // Rows of scales: two to a strip, and one.
  expect_product({shape(width, 0, 16, 48, 136), x_type, 2, LinearKernel::kDecode8, 1, 2, true});
  expect_product({shape(width, 0, 64, 128, 136), x_type, 8, LinearKernel::kDecode8, 8});
  expect_product({shape(width, 0, 16, 48, 136), x_type, 9, LinearKernel::kGemm, 4, 2, true});
}

INSTANTIATE_TEST_SUITE_P(Widths, LinearWidths,
                         ::testing::Combine(::testing::ValuesIn(kAllBitWidths),
                                            ::testing::Values(DType::kF16, DType::kBF16)));

// ---- Shapes, at one width of one plane and one of two.

class LinearShapes : public ::testing::TestWithParam<LinearKernel> {};

TEST_P(LinearShapes, Groups) {
  const int strips = GetParam() == LinearKernel::kGemm ? 4 : 2;
  for (BitWidth width : {BitWidth::k4, BitWidth::k3}) {
    for (std::optional<std::int64_t> group : std::vector<std::optional<std::int64_t>>{
             16, 32, 48, 80, 96, 128, 192, 256, std::nullopt}) {
      // 330: the last group, step and octet are short.
      expect_product({shape(width, 1, group, 40, 330), DType::kF16, 3, GetParam(), strips, 2});
    }
  }
}

TEST_P(LinearShapes, Tokens) {
  const int strips = GetParam() == LinearKernel::kGemm ? 4 : 8;
  for (std::int64_t M : {1, 2, 7, 8, 9, 16, 17, 64, 70}) {
    const bool odd = M % 2 != 0;
    expect_product({shape(BitWidth::k4, 1, 64, 48, 128), odd ? DType::kBF16 : DType::kF16, M,
                    GetParam(), strips, odd ? 2 : 1, odd});
  }
}

TEST_P(LinearShapes, Strides) {
  const int strips = GetParam() == LinearKernel::kGemm ? 4 : 1;
  Product p{shape(BitWidth::k5, 1, 64, 37, 128), DType::kF16, 5, GetParam(), strips, 2};
  for (const auto& [x_padding, x_offset] :
       {std::pair<std::int64_t, std::int64_t>{8, 0}, {3, 0}, {0, 1}, {0, 8}}) {
    p.x_padding = x_padding;
    p.x_offset = x_offset;
    p.y_padding = x_padding;
    expect_product(p);
  }
}

// Columns that end inside a vector of an aligned x, and rows of x that several threads share.
TEST_P(LinearShapes, VectorsOfX) {
  const int strips = GetParam() == LinearKernel::kGemm ? 4 : 2;
  for (std::int64_t K : {150, 152, 1100}) {
    for (bool col_scale : {false, true}) {
      Product p{shape(BitWidth::k4, 1, 64, 36, K), DType::kF16, 7, GetParam(), strips, 1, true};
      p.spec.col_scale = col_scale;
      p.x_padding = (K + 7) / 8 * 8 - K;
      expect_product(p);
    }
  }
}

// More than the block that adds up loads at a time; rows beyond the last strip; y that takes four
// rows in one store, and not.
TEST_P(LinearShapes, ManySplits) {
  const int strips = GetParam() == LinearKernel::kGemm ? 4 : 8;
  for (std::int64_t N : {96, 99}) {
    for (int splits : {8, 9, 11}) {
      expect_product({shape(BitWidth::k8, 1, 64, N, 64 * splits), DType::kBF16, 13, GetParam(),
                      strips, splits, true});
    }
  }
}

TEST_P(LinearShapes, Cuts) {
  if (GetParam() == LinearKernel::kGemm) {
    for (int splits : {1, 2, 3, 7}) {
      expect_product({shape(BitWidth::k2, 1, 64, 140, 448), DType::kF16, 3, GetParam(), 4, splits});
    }
    return;
  }
  for (int strips : {1, 2, 4, 8}) {
    for (int splits : {1, 2, 3, 7}) {
      expect_product(
          {shape(BitWidth::k6, 1, 128, 72, 448), DType::kBF16, 3, GetParam(), strips, splits});
    }
  }
}

TEST_P(LinearShapes, ColScale) {
  const int strips = GetParam() == LinearKernel::kGemm ? 4 : 2;
  Product p{shape(BitWidth::k4, 1, 64, 40, 150), DType::kF16, 3, GetParam(), strips, 1, true};
  p.spec.col_scale = true;
  expect_product(p);
  p.x_type = DType::kBF16;
  expect_product(p);
  // Each expert has its own.
  p.row_begin = {0, 2, 2, 3};
  expect_product(p);
  for (DType type : {DType::kF32, DType::kBF16}) {
    p.spec.meta_dtype = type;
    p.spec.in_features += 10;
    expect_product(p);
  }
}

// Calls fn for every way to store scale and zero.
template <class Fn>
void each_metadata_type(LayerSpec& spec, const Fn& fn) {
  for (DType type : {DType::kF16, DType::kBF16, DType::kF32}) {
    spec.meta_dtype = type;
    fn();
  }
  spec.meta_dtype = DType::kF16;
  for (const auto& [scale, zero] : {std::pair(false, true), {true, false}, {true, true}}) {
    spec.quant_scale = scale;
    spec.quant_zero = zero;
    fn();
  }
  spec.quant_scale = spec.quant_zero = false;
}

TEST_P(LinearShapes, MetadataTypes) {
  const int strips = GetParam() == LinearKernel::kGemm ? 4 : 2;
  Product p{shape(BitWidth::k4, 1, 32, 40, 150), DType::kF16, 3, GetParam(), strips, 1};
  for (DType x_type : {DType::kF16, DType::kBF16}) {
    p.x_type = x_type;
    each_metadata_type(p.spec, [&] { expect_product(p); });
  }
}

// Scales come in windows of four groups, in one load where rows have a multiple of four: all
// windows of a ring are used, and used again.
TEST_P(LinearShapes, WindowsOfScales) {
  const int strips = GetParam() == LinearKernel::kGemm ? 4 : 8;
  for (BitWidth width : {BitWidth::k1, BitWidth::k4, BitWidth::k8}) {
    for (std::int64_t group : {16, 32, 48, 64, 80, 192}) {
      for (std::int64_t K : {12 * group, 13 * group - 5}) {
        Product p{shape(width, 1, group, 33, K), DType::kF16, 2, GetParam(), strips, 1};
        expect_product(p);
        p.spec.meta_dtype = DType::kBF16;
        p.splits = 3;
        expect_product(p);
      }
    }
  }
}

TEST_P(LinearShapes, PartsOfExperts) {
  const int strips = GetParam() == LinearKernel::kGemm ? 4 : 2;
  // Three rows of three groups: what an expert has is no multiple of any load.
  for (std::int64_t K : {192, 256}) {
    Product p{shape(BitWidth::k4, 1, 64, 33, K), DType::kF16, 5, GetParam(), strips, 1};
    p.row_begin = {0, 2, 5};
    p.parts = 2;
    p.spec.col_scale = true;
    for (p.part = 0; p.part < p.parts; ++p.part) {
      each_metadata_type(p.spec, [&] { expect_product(p); });
    }
  }
}

TEST_P(LinearShapes, Experts) {
  const int strips = GetParam() == LinearKernel::kGemm ? 4 : 2;
  for (int splits : {1, 2}) {
    Product p{
        shape(BitWidth::k4, 1, 64, 40, 128), DType::kF16, 20, GetParam(), strips, splits, true};
    // Without tokens, with one, and with more than a block takes at a time.
    p.row_begin = {0, 0, 1, 1, 20, 20};
    expect_product(p);
  }
  Product many{shape(BitWidth::k4, 1, 64, 24, 64), DType::kF16, 150, GetParam(), strips, 1};
  many.row_begin = {0, 3, 150, 150, 150, 150, 150, 150, 150};
  expect_product(many);
}

INSTANTIATE_TEST_SUITE_P(Kernels, LinearShapes,
                         ::testing::Values(LinearKernel::kDecode8, LinearKernel::kDecode16,
                                           LinearKernel::kGemm));

TEST(LinearAxis0, Shapes) {
  for (LinearKernel kernel : {LinearKernel::kDecode8, LinearKernel::kGemm}) {
    const int strips = kernel == LinearKernel::kGemm ? 4 : 2;
    // One group a column; groups of a strip and a half; odd columns; col_scale; experts.
    expect_product({shape(BitWidth::k4, 0, std::nullopt, 48, 100), DType::kF16, 3, kernel, strips});
    expect_product({shape(BitWidth::k3, 0, 48, 96, 100), DType::kBF16, 9, kernel, strips, 2, true});
    Product p{shape(BitWidth::k8, 0, 32, 64, 77), DType::kBF16, 3, kernel, strips};
    p.spec.meta_dtype = DType::kF32;
    p.spec.col_scale = true;
    p.row_begin = {0, 1, 1, 3};
    expect_product(p);
    // A row of scales for one fragment and for both, columns that two lanes share and not.
    for (std::int64_t group : {16, 64}) {
      for (std::int64_t K : {200, 201}) {
        Product types{shape(BitWidth::k4, 0, group, 64, K), DType::kF16, 3, kernel, strips, 2};
        each_metadata_type(types.spec, [&] { expect_product(types); });
      }
    }
  }
}

// ---- What is refused.

TEST(Linear, ChoosesAndRefuses) {
  Rng rng(5);
  const PackedLayer layer(shape(BitWidth::k4, 1, 64, 40, 128), 1, rng);
  HalfMatrix x(DType::kF16, 3, 128, 128);
  x.randomize(rng);
  const HalfMatrix y(DType::kF16, 3, 40, 40);
  LinearArgs args = layer.args(DType::kF16);
  args.x = x.data();
  args.x_stride = 128;
  args.rows = 3;
  args.y = y.data();
  args.y_stride = 40;
  args.workspace_bytes = linear_workspace_bytes(args);
  const DeviceArray<std::byte> workspace(args.workspace_bytes);
  std::memset(workspace.data(), 0, kCounterBytes);
  args.workspace = workspace.data();
  linear(args, nullptr);
  for (std::int64_t n = 0; n < 40; ++n) {
    const Expected want =
        expected(layer.dense(0), BitWidth::k4, n, x, 2, LinearKernel::kDecode8, 0.0);
    EXPECT_NEAR(y.value(2, n), want.y, want.error);
  }

  LinearArgs small = args;
  small.workspace_bytes -= 1;
  EXPECT_THROW(linear(small, nullptr), Failure);
  const LinearPlan no_instance{LinearKernel::kDecode16, 8, 1, 2, 1};
  LinearArgs axis0 = args;
  axis0.weight.layout = {32, 128, 32, 0};
  EXPECT_THROW(linear(axis0, no_instance, nullptr), Failure);
  LinearArgs nothing = args;
  nothing.rows = 0;
  nothing.workspace_bytes = 0;
  EXPECT_NO_THROW(linear(nothing, nullptr));
}

}  // namespace
}  // namespace hqq::cuda

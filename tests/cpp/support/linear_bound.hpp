// What linear() must compute, in double from the parts of W_r = (q - z) s c, and how far from it it
// may be.
//
// Rounding. The kernels add q s c x and z s c x, each rounded to float32 (u = 2^-24) on its way to
// y at most D times, where an error is never amplified. A sum of rounded terms differs by at most
//     gamma_D A,   gamma_D = D u / (1 - D u),   A = sum_k |s| (|q| + |z|) |c x| + |bias|
// (Higham, Accuracy and Stability, lemma 3.1). |q| + |z|, not |q - z|: where one sum is formed for
// the codes and one for x alone, they cancel afterwards. 8-bit codes may be taken minus 128 and the
// zeros with them: |q| + |z| + 256 there.
//   exact: x to float32 (1), times c (2: with axis 0 times s c), W_r (2), its product with x (1), K
//   additions, the rest of a block or the sum over z (4), bias (1): D = K + 16 has room.
//   fast: sums inside a block of at most 64 columns are integers below 2^24, hence exact: D =
//   blocks + 24, where the sum over z of axis 0 has 8 lanes and a tree of them.
//
// Quantization of x (fast). In a block, X = c x (axis 0: c s x) becomes d times an integer with d =
// max |X| / 127, so that |error of X| <= d / 2. The factor 1 + 2^-10 covers that 127 X / max|X| is
// itself rounded. X is multiplied with (q - z) s (axis 0: q - z):
//     sum over blocks of d / 2 sum_k |(q - z) s|
// Blocks begin at every 64th column of a group, or are parts of such blocks, whose d is no larger.
//
// Subnormal numbers lose bits (x is divided by up to 2^16 and blocks with d < 2^-126 become zeros):
// an absolute error of 2^-118 times the factors beside it.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <span>
#include <vector>

#include "tests/cpp/support/linear_test_util.hpp"

namespace hqq::testing {

struct Expected {
  std::vector<double> y, bound;  // [rows of x, out_features]
};

inline Expected expected_linear(const DenseLayer& W, const Matrix& x, std::span<const float> bias,
                                LinearMode mode) {
  const bool fast = mode == LinearMode::kFast;
  const std::int64_t K = W.cols;
  const std::int64_t group = W.layout.axis == 1 ? std::min(W.layout.group_size, K) : K;
  const double shift = W.eight_bits ? 256.0 : 0.0;
  const double blocks = std::ceil(static_cast<double>(group) / 32) *
                        std::ceil(static_cast<double>(K) / static_cast<double>(group));
  const double roundings = fast ? blocks + 24 : static_cast<double>(K) + 16;
  const double u = std::ldexp(1.0, -24);
  const double gamma = roundings * u / (1 - roundings * u);

  Expected expected;
  for (std::int64_t m = 0; m < x.view.rows; ++m) {
    const double* xm = x.values.data() + m * K;
    for (std::int64_t n = 0; n < W.rows; ++n) {
      const double* q = W.q.data() + n * K;
      const double* s = W.s.data() + n * K;
      const double* z = W.z.data() + n * K;
      double y = 0, magnitude = 0, quantization = 0, floor = 0;
      for (std::int64_t first = 0; first < K;) {
        const std::int64_t in_group = first % group;
        const std::int64_t end = std::min({K, first + 64, first + group - in_group});
        double largest = 0, weight = 0, terms = 0;
        for (std::int64_t k = first; k < end; ++k) {
          const double X = std::abs(W.c[std::size_t(k)] * xm[k]);
          const double scale = std::abs(s[k]);
          const double code_and_zero = q[k] + std::abs(z[k]) + shift;
          y += (q[k] - z[k]) * s[k] * W.c[std::size_t(k)] * xm[k];
          magnitude += scale * code_and_zero * X;
          floor += (1 + scale) * (1 + code_and_zero) * (1 + X);
          largest = std::max(largest, W.layout.axis == 1 ? X : X * scale);
          weight += std::abs(q[k] - z[k]) * (W.layout.axis == 1 ? scale : 1.0);
          terms += code_and_zero * (W.layout.axis == 1 ? scale : 1.0);
        }
        if (fast) {
          const double half_step = largest / 127 / 2 * (1 + std::ldexp(1.0, -10));
          quantization += half_step * weight;
          magnitude += half_step * terms;
        }
        first = end;
      }
      const double b = bias.empty() ? 0.0 : static_cast<double>(bias[static_cast<std::size_t>(n)]);
      expected.y.push_back(y + b);
      expected.bound.push_back(quantization + gamma * (magnitude + std::abs(b)) +
                               std::ldexp(floor, -118));
    }
  }
  return expected;
}

// Checks y against the bound; values of 16 bits are rounded once more.
inline void expect_near(const Expected& expected, DType dtype, const std::byte* y) {
  const bool half = dtype == DType::kF16;
  const double u = half                    ? std::ldexp(1.0, -11)
                   : dtype == DType::kBF16 ? std::ldexp(1.0, -8)
                                           : std::ldexp(1.0, -24);
  for (std::size_t i = 0; i < expected.y.size(); ++i) {
    double actual;
    read_values(dtype, y + i * dtype_size(dtype), std::span(&actual, 1));
    const double bound = expected.bound[i] * (1 + u) + std::abs(expected.y[i]) * u +
                         (half ? std::ldexp(1.0, -25) : 0.0);
    if (half && std::abs(expected.y[i]) + bound > 65504) continue;
    // Written so that NaN fails.
    ASSERT_TRUE(std::abs(actual - expected.y[i]) <= bound)
        << "y[" << i << "] is " << actual << " instead of " << expected.y[i] << " +- " << bound;
  }
}

}  // namespace hqq::testing

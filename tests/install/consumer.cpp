// Quantizes a matrix through the installed headers and library, and fails when the result is off.
#include <cmath>
#include <cstdio>
#include <hqq/eigen.hpp>
#include <hqq/hqq.hpp>
#include <stdexcept>

int main() {
  hqq::RowMajorMatrix W(48, 256);
  for (Eigen::Index i = 0; i < W.rows(); ++i) {
    for (Eigen::Index j = 0; j < W.cols(); ++j) {
      W(i, j) = static_cast<float>(std::sin(0.37 * i + 1.13 * j) + 0.2 * std::cos(2.9 * j));
    }
  }

  hqq::QuantizeStats stats;
  hqq::QuantizeOptions options;
  options.stats = &stats;
  const hqq::QuantizedTensor q = hqq::Quantizer().quantize(W, "", options);
  const hqq::RowMajorMatrix W_r = hqq::dequantize_matrix(q);
  const double relative = (W - W_r).norm() / W.norm();
  std::printf("hqq %s: %.3f bits per weight, relative error %.4f\n", hqq::kVersion,
              q.bits_per_weight(), relative);
  // 4 bits leave about 0.05 here, and the library measures the same.
  if (!(relative > 0.01 && relative < 0.12) || std::abs(relative - stats.relative_error) > 1e-4) {
    std::printf("relative error out of range (the library says %.4f)\n", stats.relative_error);
    return 1;
  }

  // Exceptions cross the library's border with their type.
  try {
    hqq::LayerConfig config;
    config.group_size = 12;
    hqq::Quantizer(hqq::HqqConfig(config)).quantize(W);
  } catch (const std::invalid_argument& error) {
    std::printf("refused: %s\n", error.what());
    return 0;
  }
  std::puts("group_size 12 was accepted");
  return 1;
}

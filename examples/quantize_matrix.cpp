#include <hqq/eigen.hpp>
#include <hqq/hqq.hpp>
#include <iostream>

int main() {
  hqq::HqqConfig config;
  config.defaults.nbits = hqq::BitWidth::k3;
  config.defaults.group_size = 64;

  const hqq::RowMajorMatrix W = hqq::RowMajorMatrix::Random(512, 1024);
  hqq::QuantizeStats stats;
  hqq::QuantizeOptions options;
  options.stats = &stats;
  const hqq::QuantizedTensor q = hqq::Quantizer(config).quantize(W, "mlp.up_proj", options);

  const hqq::RowMajorMatrix x = hqq::RowMajorMatrix::Random(2, 1024);
  const hqq::RowMajorMatrix y = hqq::linear(x, q);  // x W_r^T, [2, 512]
  std::cout << q.bits_per_weight() << " bits a weight, relative error " << stats.relative_error
            << ", y is " << y.rows() << " x " << y.cols() << "\n";
}

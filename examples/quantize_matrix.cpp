#include <hqq/eigen.hpp>
#include <hqq/hqq.hpp>
#include <iostream>

int main() {
  const hqq::RowMajorMatrix W = hqq::RowMajorMatrix::Random(512, 1024);
  const hqq::Linear layer(hqq::Quantizer().quantize(W));

  const hqq::RowMajorMatrix x = hqq::RowMajorMatrix::Random(2, 1024);
  const hqq::RowMajorMatrix y = hqq::linear(x, layer);  // x W_r^T
  std::cout << "relative error of y: " << (y - x * W.transpose()).norm() / y.norm() << "\n";
}

#include <hqq/eigen.hpp>
#include <iostream>

int main() {
  const hqq::RowMajorMatrix W = hqq::RowMajorMatrix::Random(512, 1024);
  const hqq::Linear layer(hqq::Quantizer().quantize(W));

  const hqq::RowMajorMatrix x = hqq::RowMajorMatrix::Random(2, 1024);
  hqq::RowMajorMatrix y(2, 512);
  layer(x, y.data());  // x W_r^T
  std::cout << "relative error of y: " << (y - x * W.transpose()).norm() / y.norm() << "\n";
}

#include "hqq/linear.hpp"

#include "hqq/error.hpp"

namespace hqq {

RowMajorMatrix linear(const Eigen::Ref<const RowMajorMatrix>& x, const QuantizedTensor& q,
                      std::span<const float> bias, int threads) {
  if (x.cols() != q.in_features) {
    throw_invalid("linear", "x has " + std::to_string(x.cols()) + " columns; the layer takes " +
                                std::to_string(q.in_features));
  }
  if (!bias.empty() && static_cast<std::int64_t>(bias.size()) != q.out_features) {
    throw_invalid("linear", "bias has " + std::to_string(bias.size()) + " values; the layer has " +
                                std::to_string(q.out_features) + " outputs");
  }
  RowMajorMatrix y = x * dequantize_matrix(q, threads).transpose();
  if (!bias.empty()) {
    y.rowwise() +=
        Eigen::Map<const Eigen::RowVectorXf>(bias.data(), static_cast<Eigen::Index>(bias.size()));
  }
  return y;
}

}  // namespace hqq

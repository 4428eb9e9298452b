// Eigen matrices as results; as arguments they convert to a TensorView. Only who includes this
// header needs Eigen (target hqq::eigen): the library takes pointers, so a program may be compiled
// with other flags than the library.
#pragma once

#include <Eigen/Core>
#include <span>

#include "hqq/linear.hpp"
#include "hqq/quantizer.hpp"

namespace hqq {

using RowMajorMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

inline RowMajorMatrix dequantize_matrix(const QuantizedTensor& q,
                                        const DequantizeOptions& options = {}) {
  RowMajorMatrix dense(q.out_features, q.in_features);
  dequantize(q, dense.data(), {DType::kF32, options.threads});
  return dense;
}

// y [M, out_features] = x [M, in_features] W_r^T + bias. Weight: a TiledTensor or, for a product
// that is computed once, a QuantizedTensor.
template <class Weight>
RowMajorMatrix linear(const Eigen::Ref<const RowMajorMatrix>& x, const Weight& q,
                      std::span<const float> bias = {}, const LinearOptions& options = {}) {
  RowMajorMatrix y(x.rows(), q.out_features);
  linear(TensorView(x), q, bias, y.data(), options);
  return y;
}
// By a layer on the CPU, with its bias.
inline RowMajorMatrix linear(const Eigen::Ref<const RowMajorMatrix>& x, const Linear& layer,
                             const LinearOptions& options = {}) {
  RowMajorMatrix y(x.rows(), layer.out_features());
  layer(TensorView(x), y.data(), options);
  return y;
}

}  // namespace hqq

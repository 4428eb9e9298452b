#include "weights.hpp"

#include <algorithm>

namespace {

// Rows [first, first + count) of a float tensor whose rows have `cols` values.
Matrix read_rows(const hqq::Tensor& tensor, std::int64_t first, std::int64_t count) {
  const std::int64_t cols = tensor.shape.back();
  const auto read = [&]<class T>(const T* values) -> Matrix {
    using Rows = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    return Eigen::Map<const Rows>(values + first * cols, count, cols).template cast<float>();
  };
  if (tensor.dtype == hqq::DType::kBF16) return read(tensor.data<Eigen::bfloat16>());
  if (tensor.dtype == hqq::DType::kF16) return read(tensor.data<Eigen::half>());
  if (tensor.dtype == hqq::DType::kF64) return read(tensor.data<double>());
  return read(tensor.data<float>());
}

hqq::QuantizedTensor quantize(const hqq::Tensor& matrix, int bits) {
  hqq::LayerConfig config;
  config.nbits = hqq::bit_width_from_nbits(bits).value();
  config.balance = hqq::Balance::kNone;
  if (bits == 8) config.solver = hqq::Solver::kMinMax;  // as good and fast
  return hqq::Quantizer{hqq::HqqConfig(config)}.quantize(hqq::TensorView(matrix));
}

}  // namespace

Matrix Linear::dense_product(const Matrix& x) const {
  Matrix y(x.rows(), out);
  constexpr std::int64_t kBlock = 256;  // rows at a time: no float32 copy of the whole matrix
  for (std::int64_t first = 0; first < out; first += kBlock) {
    const std::int64_t count = std::min(kBlock, out - first);
    y.middleCols(first, count).noalias() = x * read_rows(dense, first, count).transpose();
  }
  if (!bias.empty()) y.rowwise() += Eigen::Map<const Eigen::RowVectorXf>(bias.data(), out);
  return y;
}

std::vector<Matrix> multiply(std::span<const Linear* const> layers, const Matrix& x,
                             const hqq::LinearOptions& options) {
  std::vector<Matrix> ys;
  std::vector<hqq::LinearCall> calls;
  for (const Linear* layer : layers) {
    Matrix& y =
        ys.emplace_back(layer->dense ? layer->dense_product(x) : Matrix(x.rows(), layer->out));
    if (layer->dense) continue;
    // Into our memory: a library that was built with other flags aligns Eigen's differently.
    const hqq::TensorView rows{x.data(), hqq::DType::kF32, x.rows(), layer->in};
    calls.push_back({rows, &layer->quantized, layer->bias, y.data()});
  }
  hqq::linear(calls, options);
  return ys;
}

Matrix Linear::rows(std::span<const std::int64_t> indices) const {
  Matrix result(indices.size(), in);
  if (!dense) {
    hqq::dequantize_rows(quantized, indices, result.data());
    return result;
  }
  for (std::size_t i = 0; i < indices.size(); ++i) {
    const std::int64_t row = indices[i];
    if (row < 0 || row >= out) hqq::throw_invalid(name, "there is no row " + std::to_string(row));
    result.row(i) = read_rows(dense, row, 1);
  }
  return result;
}

Weights::Weights(const std::filesystem::path& folder) : checkpoint_(folder) {
  for (const std::string& name : hqq::quantized_layers(checkpoint_)) quantized_.insert(name);
}

hqq::Tensor Weights::tensor(const std::string& name, const std::vector<std::int64_t>& shape) const {
  const auto [info, shard] = checkpoint_.find(name);
  if (info == nullptr || info->shape != shape || !hqq::is_weight_dtype(info->dtype)) {
    hqq::throw_format(name, "there must be a float tensor " + hqq::shape_string(shape) +
                                "; it is " + (info ? hqq::shape_string(info->shape) : "missing"));
  }
  return checkpoint_.shard(shard).map(*info);
}

std::vector<float> Weights::vector(const std::string& name, std::int64_t size) const {
  const Matrix values = read_rows(tensor(name, {size}), 0, 1);
  return {values.data(), values.data() + size};
}

Linear Weights::linear(const std::string& name, std::int64_t out, std::int64_t in, int bits) const {
  Linear layer{name, out, in, {}, {}, {}};
  if (checkpoint_.find(name + ".bias").first) layer.bias = vector(name + ".bias", out);
  if (quantized_.contains(name)) {
    hqq::QuantizedTensor q = hqq::load_quantized(checkpoint_, name);
    if (q.out_features != out || q.in_features != in) {
      hqq::throw_format(name, "the layer must be " + hqq::shape_string({out, in}) + "; it is " +
                                  hqq::shape_string({q.out_features, q.in_features}));
    }
    layer.quantized = hqq::tile(std::move(q));
  } else if (bits != 0) {
    layer.quantized = hqq::tile(quantize(tensor(name + ".weight", {out, in}), bits));
  } else {
    layer.dense = tensor(name + ".weight", {out, in});
  }
  return layer;
}

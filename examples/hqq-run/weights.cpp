#include "weights.hpp"

#include <algorithm>
#include <utility>

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
  return hqq::Quantizer{hqq::HqqConfig(config)}.quantize(hqq::TensorView(matrix));
}

}  // namespace

Matrix Linear::operator()(const Matrix& x, const hqq::LinearOptions& options) const {
  if (!dense) return hqq::linear(x, quantized, bias, options);
  Matrix y(x.rows(), out);
  constexpr std::int64_t kBlock = 256;  // rows at a time: no float32 copy of the whole matrix
  for (std::int64_t first = 0; first < out; first += kBlock) {
    const std::int64_t count = std::min(kBlock, out - first);
    y.middleCols(first, count).noalias() = x * read_rows(dense, first, count).transpose();
  }
  if (!bias.empty()) y.rowwise() += Eigen::Map<const Eigen::RowVectorXf>(bias.data(), out);
  return y;
}

Matrix Linear::rows(std::span<const std::int64_t> indices) const {
  Matrix result(indices.size(), in);
  if (!dense) {
    hqq::dequantize_rows(quantized, indices, hqq::DType::kF32, result.data());
    return result;
  }
  for (std::size_t i = 0; i < indices.size(); ++i) result.row(i) = read_rows(dense, indices[i], 1);
  return result;
}

Weights::Weights(const std::filesystem::path& folder) : checkpoint_(folder) {
  for (const std::string& name : hqq::quantized_layers(checkpoint_)) quantized_.insert(name);
}

hqq::Tensor Weights::tensor(const std::string& name, const std::vector<std::int64_t>& shape) const {
  const auto [info, shard] = checkpoint_.find(name);
  const std::string wanted = "must be a float tensor " + hqq::shape_string(shape);
  if (info == nullptr) hqq::throw_format(name, wanted + "; there is none");
  if (info->shape != shape || !hqq::is_weight_dtype(info->dtype)) {
    hqq::throw_format(name, wanted + "; it is " + std::string(hqq::dtype_name(info->dtype)) + " " +
                                hqq::shape_string(info->shape));
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

#include "hqq/quantized_tensor.hpp"

#include <algorithm>

#include "hqq/error.hpp"

namespace hqq {
namespace {

void check(const std::string& name, const char* field, const Tensor& tensor, bool wanted,
           DType dtype, const std::vector<std::int64_t>& shape) {
  if (!wanted) {
    if (tensor) throw_format(name, std::string(field) + " is present, but the settings exclude it");
    return;
  }
  if (!tensor) throw_format(name, std::string(field) + " is missing");
  if (tensor.dtype != dtype) {
    throw_format(name, std::string(field) + " is " + std::string(dtype_name(tensor.dtype)) +
                           "; it must be " + std::string(dtype_name(dtype)));
  }
  if (tensor.shape != shape) {
    throw_format(name, std::string(field) + " has the shape " + shape_string(tensor.shape) +
                           "; it must be " + shape_string(shape));
  }
  if (tensor.nbytes() != static_cast<std::size_t>(tensor.numel()) * dtype_size(dtype)) {
    throw_format(name,
                 std::string(field) + " has " + std::to_string(tensor.nbytes()) +
                     " bytes; its shape " + shape_string(shape) + " needs " +
                     std::to_string(static_cast<std::size_t>(tensor.numel()) * dtype_size(dtype)));
  }
}

}  // namespace

core::GroupLayout PackedMatrix::layout() const {
  const std::int64_t whole = config.axis == 1 ? in_features : out_features;
  // A larger group is one short group, like any tail.
  const std::int64_t most = config.axis == 1 ? in_features : out_features * in_features;
  return {out_features, in_features, std::min(config.group_size.value_or(whole), most),
          config.axis};
}

std::vector<std::int64_t> QuantizedTensor::metadata_shape() const {
  return {layout().metadata_rows(), layout().metadata_cols()};
}

std::vector<std::pair<std::string, Tensor*>> PackedMatrix::fields() {
  return {{"W_q", &W_q},
          {"scale", &scale},
          {"zero", &zero},
          {"scale_step", &scale_step},
          {"scale_offset", &scale_offset},
          {"zero_step", &zero_step},
          {"zero_offset", &zero_offset},
          {"col_scale", &col_scale}};
}

std::vector<std::pair<std::string, const Tensor*>> PackedMatrix::tensors() const {
  std::vector<std::pair<std::string, const Tensor*>> present;
  for (const auto& [name, tensor] : const_cast<PackedMatrix*>(this)->fields()) {
    if (*tensor) present.emplace_back(name, tensor);
  }
  return present;
}

std::int64_t PackedMatrix::nbytes() const {
  std::int64_t total = 0;
  for (const auto& [name, tensor] : tensors()) total += static_cast<std::int64_t>(tensor->nbytes());
  return total;
}

double QuantizedTensor::bits_per_weight() const {
  return 8.0 * static_cast<double>(nbytes()) /
         (static_cast<double>(out_features) * static_cast<double>(in_features));
}

void QuantizedTensor::allocate() {
  const std::vector<std::int64_t> shape = metadata_shape();
  const std::int64_t blocks = metadata_blocks();
  W_q = Tensor::allocate(DType::kU8, {out_features, packed_row_bytes(config.nbits, in_features)});
  scale = Tensor::allocate(config.quant_scale ? DType::kU8 : config.meta_dtype, shape);
  zero = Tensor::allocate(config.quant_zero ? DType::kU8 : config.meta_dtype, shape);
  if (config.quant_scale) {
    scale_step = Tensor::allocate(DType::kF32, {blocks});
    scale_offset = Tensor::allocate(DType::kF32, {blocks});
  }
  if (config.quant_zero) {
    zero_step = Tensor::allocate(DType::kF32, {blocks});
    zero_offset = Tensor::allocate(DType::kF32, {blocks});
  }
  if (config.balance == Balance::kSinkhorn) {
    col_scale = Tensor::allocate(config.meta_dtype, {in_features});
  }
}

std::int64_t PackedMatrix::metadata_blocks() const {
  return (layout().num_groups() + kMetadataBlock - 1) / kMetadataBlock;
}

void QuantizedTensor::validate(const std::string& name) const {
  if (out_features <= 0 || in_features <= 0) {
    throw_format(name, "the shape " + shape_string({out_features, in_features}) +
                           " is not that of a matrix");
  }
  const std::vector<std::int64_t> shape = metadata_shape();
  const std::vector<std::int64_t> blocks = {metadata_blocks()};
  check(name, "W_q", W_q, true, DType::kU8,
        {out_features, packed_row_bytes(config.nbits, in_features)});
  check(name, "scale", scale, true, config.quant_scale ? DType::kU8 : config.meta_dtype, shape);
  check(name, "zero", zero, true, config.quant_zero ? DType::kU8 : config.meta_dtype, shape);
  check(name, "scale_step", scale_step, config.quant_scale, DType::kF32, blocks);
  check(name, "scale_offset", scale_offset, config.quant_scale, DType::kF32, blocks);
  check(name, "zero_step", zero_step, config.quant_zero, DType::kF32, blocks);
  check(name, "zero_offset", zero_offset, config.quant_zero, DType::kF32, blocks);
  check(name, "col_scale", col_scale, config.balance == Balance::kSinkhorn, config.meta_dtype,
        {in_features});
}

}  // namespace hqq

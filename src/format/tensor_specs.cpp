#include "src/format/tensor_specs.hpp"

#include <algorithm>

#include "hqq/bitpack.hpp"
#include "hqq/core/metadata.hpp"
#include "hqq/error.hpp"

namespace hqq {
namespace {

// "float16 [17, 2]"
std::string form_of(DType dtype, const std::vector<std::int64_t>& shape) {
  return std::string(dtype_name(dtype)) + " " + shape_string(shape);
}

// What is wrong with a tensor, as the end of a sentence; empty: nothing.
std::string problem_of(const Tensor& tensor, const TensorSpec& spec) {
  if (!spec.present) return tensor ? " is present, but the settings exclude it" : "";
  if (!tensor) return " is missing";
  if (tensor.dtype != spec.dtype || tensor.shape != spec.shape) {
    return " is " + form_of(tensor.dtype, tensor.shape) + "; it must be " +
           form_of(spec.dtype, spec.shape);
  }
  if (tensor.nbytes() != spec.nbytes()) {
    return " has " + std::to_string(tensor.nbytes()) + " bytes; its shape " +
           shape_string(spec.shape) + " needs " + std::to_string(spec.nbytes());
  }
  return "";
}

}  // namespace

std::uint64_t TensorSpec::nbytes() const {
  if (!present) return 0;
  return static_cast<std::uint64_t>(checked_numel(shape, "layer")) * dtype_size(dtype);
}

core::GroupLayout group_layout(const LayerConfig& config, std::int64_t out_features,
                               std::int64_t in_features) {
  const std::int64_t whole = config.axis == 1 ? in_features : out_features;
  // A larger group is one short group, like any tail.
  const std::int64_t most = config.axis == 1 ? in_features : out_features * in_features;
  return {out_features, in_features, std::min(config.group_size.value_or(whole), most),
          config.axis};
}

TensorSpecs tensor_specs(const LayerConfig& config, std::int64_t out_features,
                         std::int64_t in_features) {
  if (config.balance == Balance::kAuto) {
    throw_invalid("format", "balance is 'auto'; a stored layer has 'none' or 'sinkhorn'");
  }
  if (out_features <= 0 || in_features <= 0) {
    throw_invalid("format", "the shape " + shape_string({out_features, in_features}) +
                                " is not that of a matrix");
  }
  const core::GroupLayout layout = group_layout(config, out_features, in_features);
  const std::vector<std::int64_t> groups = {layout.metadata_rows(), layout.metadata_cols()};
  const std::vector<std::int64_t> blocks = {(layout.num_groups() + core::kMetadataBlock - 1) /
                                            core::kMetadataBlock};
  const bool scales = config.quant_scale, zeros = config.quant_zero;
  const DType meta = config.meta_dtype;
  TensorSpecs specs = {{
      {"", true, DType::kU8, {out_features, packed_row_bytes(config.nbits, in_features)}},
      {"", true, scales ? DType::kU8 : meta, groups},
      {"", true, zeros ? DType::kU8 : meta, groups},
      {"", scales, DType::kF32, blocks},
      {"", scales, DType::kF32, blocks},
      {"", zeros, DType::kF32, blocks},
      {"", zeros, DType::kF32, blocks},
      {"", config.balance == Balance::kSinkhorn, meta, {in_features}},
  }};
  for (std::size_t i = 0; i < specs.size(); ++i) specs[i].name = kTensorNames[i];
  return specs;
}

std::uint64_t nbytes_of(const TensorSpecs& specs) {
  std::uint64_t total = 0;
  for (const TensorSpec& spec : specs) total += spec.nbytes();
  return total;
}

void allocate_tensors(PackedMatrix& q, const TensorSpecs& specs) {
  std::size_t i = 0;
  for (const auto& [name, tensor] : q.fields()) {
    const TensorSpec& spec = specs[i++];
    *tensor = spec.present ? Tensor::allocate(spec.dtype, spec.shape) : Tensor();
  }
}

void describe_tensors(PackedMatrix& q, const TensorSpecs& specs) {
  // Not null, which would say that the tensor is absent; nobody reads it.
  static std::byte nowhere;
  std::size_t i = 0;
  for (const auto& [name, tensor] : q.fields()) {
    const TensorSpec& spec = specs[i++];
    *tensor = Tensor();
    if (!spec.present) continue;
    tensor->dtype = spec.dtype;
    tensor->shape = spec.shape;
    tensor->buffer.data = &nowhere;
    tensor->buffer.size = spec.nbytes();
  }
}

void check_tensors(const PackedMatrix& q, const TensorSpecs& specs, const std::string& where,
                   std::string_view kind) {
  std::size_t i = 0;
  for (const auto& [name, tensor] : q.fields()) {
    const std::string problem = problem_of(*tensor, specs[i++]);
    if (!problem.empty()) throw_format(where, std::string(kind) + name + problem);
  }
}

}  // namespace hqq

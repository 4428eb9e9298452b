#include "hqq/quantized_tensor.hpp"

#include "hqq/error.hpp"
#include "src/format/tensor_specs.hpp"

namespace hqq {

std::vector<std::pair<std::string, Tensor*>> PackedMatrix::fields() {
  const std::array tensors = {&W_q,          &scale,     &zero,        &scale_step,
                              &scale_offset, &zero_step, &zero_offset, &col_scale};
  static_assert(tensors.size() == kTensorNames.size());
  std::vector<std::pair<std::string, Tensor*>> all;
  for (std::size_t i = 0; i < tensors.size(); ++i) all.emplace_back(kTensorNames[i], tensors[i]);
  return all;
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
  allocate_tensors(*this, tensor_specs(config, out_features, in_features));
}

void QuantizedTensor::validate(const std::string& name) const {
  if (out_features <= 0 || in_features <= 0) {
    throw_format(name, "the shape " + shape_string({out_features, in_features}) +
                           " is not that of a matrix");
  }
  check_tensors(*this, tensor_specs(config, out_features, in_features), name);
}

}  // namespace hqq

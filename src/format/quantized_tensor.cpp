#include "hqq/quantized_tensor.hpp"

#include "hqq/error.hpp"
#include "src/format/tensor_specs.hpp"

namespace hqq {
namespace {

// The fields of a PackedMatrix, const or not.
template <class Matrix>
auto fields_of(Matrix& q) {
  const std::array tensors = {&q.W_q,          &q.scale,     &q.zero,        &q.scale_step,
                              &q.scale_offset, &q.zero_step, &q.zero_offset, &q.col_scale};
  static_assert(tensors.size() == kTensorNames.size());
  std::vector<std::pair<std::string, std::decay_t<decltype(tensors[0])>>> all;
  for (std::size_t i = 0; i < tensors.size(); ++i) all.emplace_back(kTensorNames[i], tensors[i]);
  return all;
}

}  // namespace

std::vector<std::pair<std::string, Tensor*>> PackedMatrix::fields() { return fields_of(*this); }
std::vector<std::pair<std::string, const Tensor*>> PackedMatrix::fields() const {
  return fields_of(*this);
}

std::vector<std::pair<std::string, const Tensor*>> PackedMatrix::tensors() const {
  std::vector<std::pair<std::string, const Tensor*>> present = fields();
  std::erase_if(present, [](const auto& field) { return !*field.second; });
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

// What the bindings of QuantizedTensor and TiledTensor share.
#pragma once

#include <algorithm>

#include "hqq/quantized_tensor.hpp"
#include "python/bindings/array.hpp"
#include "python/bindings/config.hpp"
#include "src/config/layer_match.hpp"

namespace hqq::python {

// A matrix of type Q (QuantizedTensor or TiledTensor) from its tensors by name.
template <class Q>
Q matrix_from_tensors(const py::dict& tensors, const py::object& config,
                      const std::pair<std::int64_t, std::int64_t>& shape) {
  Q q;
  q.config = layer_config_from_python(config);
  q.config.validate();
  std::tie(q.out_features, q.in_features) = shape;
  // Keeps the sizes computed from it far from overflow.
  constexpr std::int64_t kMaxWeights = std::int64_t{1} << 56;
  if (checked_numel({q.out_features, q.in_features}, "from_tensors") > kMaxWeights) {
    throw_format("from_tensors", "the shape " + shape_string({q.out_features, q.in_features}) +
                                     " has more than 2^56 weights");
  }
  auto fields = q.fields();
  for (const auto& [key, value] : tensors) {
    const std::string name = utf8_of(py::str(key));
    const auto field = std::find_if(fields.begin(), fields.end(),
                                    [&](const auto& one) { return one.first == name; });
    if (field == fields.end()) {
      std::vector<std::string> names;
      for (const auto& [known, tensor] : fields) names.push_back(known);
      throw_invalid("from_tensors", unknown_name_message("tensor", name, names));
    }
    if (!value.is_none()) *field->second = tensor_from_python(value, "from_tensors, " + name);
  }
  if (q.config.balance == Balance::kAuto) {
    q.config.balance = q.col_scale ? Balance::kSinkhorn : Balance::kNone;
  }
  q.validate("from_tensors");
  return q;
}

template <class Q>
py::dict tensors_of(const Q& q) {
  py::dict dict;
  for (const auto& [name, tensor] : q.tensors()) dict[py::str(name)] = *tensor;
  return dict;
}

// "[8, 64], nbits=4, group_size=64, axis=1", for repr().
inline std::string describe_matrix(const PackedMatrix& q) {
  const std::string group_size =
      q.config.group_size ? std::to_string(*q.config.group_size) : std::string("None");
  return shape_string({q.out_features, q.in_features}) +
         ", nbits=" + py::repr(nbits_to_python(q.config.nbits)).cast<std::string>() +
         ", group_size=" + group_size + ", axis=" + std::to_string(q.config.axis);
}

// Read-only attributes for the tensors: W_q, scale and zero always, the others maybe None.
template <class Q>
void bind_fields(py::class_<Q>& type) {
  using OptionalTensor = std::optional<Tensor>;
  for (const char* name : kTensorNames) {
    const auto get = [name](Q& q) -> OptionalTensor {
      for (const auto& [field, tensor] : q.fields()) {
        if (field == name && *tensor) return *tensor;
      }
      return std::nullopt;
    };
    const std::string_view view = name;
    if (view == "W_q" || view == "scale" || view == "zero") {
      type.def_property_readonly(name, [get](Q& q) { return *get(q); });
    } else {
      type.def_property_readonly(name, get);
    }
  }
  type.def_property_readonly(
          "config", [](const Q& q) { return q.config; }, "LayerConfig it was quantized with.")
      .def_property_readonly(
          "shape", [](const Q& q) { return std::pair(q.out_features, q.in_features); },
          "(out_features, in_features).")
      .def_readonly("out_features", &Q::out_features, "Rows of W.")
      .def_readonly("in_features", &Q::in_features, "Columns of W.")
      .def_property_readonly("nbytes", &Q::nbytes, "Bytes of all tensors.");
}

}  // namespace hqq::python

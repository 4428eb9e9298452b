// HqqConfig and LayerConfig between Python and C++.
#pragma once

#include "python/bindings/common.hpp"
#include "src/config/config_json.hpp"

namespace hqq::python {

// hqq_cpp.HqqConfig: the settings, and where the importance of a model's columns comes from, which
// only Python knows.
struct BoundConfig : HqqConfig {
  BoundConfig() = default;
  explicit BoundConfig(HqqConfig config) : HqqConfig(std::move(config)) {}
  py::object importance = py::none();
};

// Types for signatures only: nothing is checked before layer_config_from_json(), whose messages
// name the field.
template <class T>
using Optional = py::typing::Optional<T>;
using Bool = py::typing::Union<py::bool_>;
using Number = py::typing::Union<py::int_, py::float_>;
using Name = py::typing::Union<py::str>;

// 4 or 1.58, the number that users write.
Number nbits_to_python(BitWidth width);

// The fields of `json` that differ from those of `defaults`.
py::dict changed_fields(const Json& json, const Json& defaults);

}  // namespace hqq::python

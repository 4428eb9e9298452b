// What the bind_*.cpp files share.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "hqq/config.hpp"
#include "hqq/dtype.hpp"
#include "hqq/error.hpp"
#include "hqq/tensor.hpp"
#include "src/base/quoted_text.hpp"

namespace hqq::python {

namespace py = pybind11;
using Json = nlohmann::ordered_json;
using OptionalDict = py::typing::Optional<py::dict>;
using Shape = py::typing::Tuple<py::int_, py::ellipsis>;

// One a header; module.cpp calls them in this order.
void bind_error(py::module_& m);
void bind_json(py::module_& m);
void bind_device(py::module_& m);
void bind_tensor(py::module_& m);
void bind_layer_config(py::module_& m);
void bind_config(py::module_& m);
void bind_format(py::module_& m);
void bind_quantized_tensor(py::module_& m);
void bind_tiled_tensor(py::module_& m);
void bind_quantizer(py::module_& m);
void bind_roles(py::module_& m);
void bind_linear(py::module_& m);
void bind_cuda(py::module_& m);
void bind_safetensors(py::module_& m);
void bind_checkpoint(py::module_& m);
void bind_checkpoint_operations(py::module_& m);
void bind_upstream(py::module_& m);
void bind_cli(py::module_& m);

// A str as it comes from Python. pybind11 calls one without UTF-8 (half of a surrogate pair) an
// incompatible argument; as Text it is a std::invalid_argument that says so.
struct Text : std::string {
  Text() = default;
  explicit Text(std::string text) : std::string(std::move(text)) {}
};
// The UTF-8 of a str. Throws std::invalid_argument for one that has none.
std::string utf8_of(py::handle text);

// Dicts, lists, strings, numbers (NumPy's too), bools and None. Throws std::invalid_argument for
// anything else, naming `where`.
Json json_from_python(py::handle value, const std::string& where);
py::object json_to_python(const Json& json);

// An HqqConfig, a LayerConfig (settings without rules), a dict in any form config_from_json()
// reads, an object whose to_dict() gives one, or None.
HqqConfig config_from_python(py::handle value);
// The settings for a single matrix. A LayerConfig has no rules: no name is skipped.
HqqConfig matrix_config_from_python(py::handle value);
// The settings of one layer: a LayerConfig, or the defaults of what config_from_python() takes.
LayerConfig layer_config_from_python(py::handle value);

// "float16", a NumPy dtype or scalar type, or a torch dtype. `allowed` is for the message.
DType dtype_from_python(py::handle value, const std::string& where, const std::string& allowed);

py::object shape_to_python(const std::vector<std::int64_t>& shape);

// `Name(a=1, b='x')` from a dict.
std::string repr_of(const std::string& name, const py::dict& fields);

// The type of an object, for messages.
std::string type_name(py::handle value);

}  // namespace hqq::python

namespace pybind11::detail {

template <>
struct type_caster<hqq::python::Text> {
  PYBIND11_TYPE_CASTER(hqq::python::Text, const_name("str"));
  bool load(handle source, bool /*convert*/) {
    if (!isinstance<str>(source)) return false;
    value = hqq::python::Text(hqq::python::utf8_of(source));
    return true;
  }
};

}  // namespace pybind11::detail

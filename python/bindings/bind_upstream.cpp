// Single layers in upstream's layout: src/io/formats/upstream.hpp.
#include "hqq/quantized_tensor.hpp"
#include "python/bindings/array.hpp"
#include "src/io/formats/upstream.hpp"

namespace hqq::python {
namespace {

constexpr const char* kUpstreamDoc = R"doc(What the tensors of a layer of upstream hqq say about it.

Args:
    tensors: Key ("W_q", "nbits", ...) -> array. Of W_q, scale, zero and zero_scale only shape and
        dtype count.
    name: Of the layer, for messages.

Returns:
    (LayerConfig, (out_features, in_features)).

Raises:
    FormatError: For tensors that upstream would not have written.
    ValueError: For a layer that format 1 cannot hold.
)doc";

constexpr const char* kFromDoc = R"doc(Converts one layer of upstream hqq's state_dict.

Args:
    tensors: Key ("W_q", "nbits", ...) -> array; a bias is ignored.
    name: Of the layer, for messages.

Raises:
    FormatError: For tensors that upstream would not have written.
    ValueError: For a layer that format 1 cannot hold.
)doc";

std::map<std::string, Tensor> tensors_from(const py::dict& tensors, const std::string& name) {
  std::map<std::string, Tensor> result;
  for (const auto& [key, value] : tensors) {
    const std::string field = utf8_of(py::str(key));
    result.emplace(field, tensor_from_python(value, name + "." + field));
  }
  return result;
}

py::tuple parse(const py::dict& tensors, const Text& name) {
  const UpstreamLayer layer = parse_upstream(tensors_from(tensors, name), name);
  return py::make_tuple(layer.config, py::make_tuple(layer.out_features, layer.in_features));
}

QuantizedTensor read_layer(const py::dict& tensors, const Text& name) {
  const std::map<std::string, Tensor> fields = tensors_from(tensors, name);
  const py::gil_scoped_release release;
  return from_upstream(fields, name);
}

}  // namespace

void bind_upstream(py::module_& m) {
  m.attr("UPSTREAM_KEYS") = upstream_keys();
  m.def("parse_upstream", &parse, py::arg("tensors"), py::arg("name"), kUpstreamDoc);
  m.def("from_upstream", &read_layer, py::arg("tensors"), py::arg("name"), kFromDoc);
}

}  // namespace hqq::python

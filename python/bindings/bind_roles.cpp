// Roles: src/model/roles.hpp, and what of src/model else Python needs.
#include "python/bindings/config.hpp"
#include "src/config/config_json.hpp"
#include "src/model/balance.hpp"
#include "src/model/role_names.hpp"
#include "src/model/roles.hpp"

namespace hqq::python {
namespace {

constexpr const char* kRolesDoc =
    R"doc(What the tensors of a model are: linear weights, embeddings, ...

The rule of hqq-cpp quantize, which looks at names, shapes, types, tensors beside each other and the
model types in config.json.

Args:
    tensors: (name, shape, dtype) of all tensors of the model, as in its files or its state dict. A
        dtype is a name ("bfloat16") or one of torch or NumPy; one that format 1 does not know
        counts as uint8.
    config: The text of config.json, or "".

Raises:
    FormatError: If config is no JSON.

Example:
    >>> roles = hqq_cpp._core.Roles([("mlp.gate.weight", (4, 64), "float32"),
    ...                              ("mlp.up.weight", (128, 64), "float32")])
    >>> roles.role("mlp.gate.weight"), roles.role("mlp.up.weight")
    ('router', 'linear')
)doc";

constexpr const char* kRoleDoc = R"doc(The role of a tensor.

Args:
    tensor: Its name.

Returns:
    'linear', 'head', 'embedding', 'router', 'experts' ([experts, out, in]), 'conv1d' (stored
    [in, out]), 'conv2d' ([out, in, 1, 1]), or 'none': anything else, and unknown names.
)doc";

constexpr const char* kSettingsDoc = R"doc(The LayerConfig of a layer, or None if it stays dense.

A router does in any case, an embedding unless a rule names it; a head is skipped where skip_modules
has "lm_head", whatever its own name is.

Args:
    config: An HqqConfig.
    layer: Its name, without ".weight".
    role: As Roles.role() gives it.
)doc";

DType dtype_of(py::handle dtype) {
  const std::string text = py::str(dtype).cast<std::string>();
  return dtype_from_name(text.substr(text.rfind('.') + 1)).value_or(DType::kU8);
}

Roles make_roles(const py::iterable& tensors, const Text& config) {
  std::vector<TensorInfo> infos;
  for (const py::handle item : tensors) {
    const auto [name, shape, dtype] =
        item.cast<std::tuple<Text, std::vector<std::int64_t>, py::object>>();
    infos.push_back({name, dtype_of(dtype), shape, 0, 0});
  }
  std::vector<const TensorInfo*> pointers;
  for (const TensorInfo& info : infos) pointers.push_back(&info);
  return Roles(config, pointers);
}

std::optional<LayerConfig> settings(const BoundConfig& config, const Text& layer,
                                    const Text& role) {
  return settings_of(layer, role_from_string(role), config);
}

}  // namespace

void bind_roles(py::module_& m) {
  py::class_<Roles>(m, "Roles", kRolesDoc)
      .def(py::init(&make_roles), py::arg("tensors"), py::arg("config") = "")
      .def(
          "role",
          [](const Roles& self, const Text& tensor) { return to_string(self.role(tensor)); },
          py::arg("tensor"), kRoleDoc);
  m.def("settings_of", &settings, py::arg("config"), py::arg("layer"), py::arg("role"),
        kSettingsDoc);
  m.def(
      "is_adapter_name", [](const Text& component) { return is_adapter_name(component); },
      py::arg("component"),
      "Whether a component of a name is what peft calls a part of an adapter: 'lora_A'.");
  m.def(
      "resolve_balance",
      [](const Text& balance, bool has_importance) {
        const Json given = {{"balance", balance}};
        const LayerConfig config = layer_config_from_json(given, LayerConfig{}, "balance");
        return to_string(resolve_balance(config.balance, has_importance));
      },
      py::arg("balance"), py::arg("has_importance"),
      "What balance 'auto' means for a layer; 'none' and 'sinkhorn' mean themselves.");
}

}  // namespace hqq::python

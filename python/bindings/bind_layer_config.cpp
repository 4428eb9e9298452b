// hqq_cpp.LayerConfig: include/hqq/config.hpp.
#include "python/bindings/config.hpp"
#include "src/config/config_json.hpp"

namespace hqq::python {
namespace {

constexpr const char* kLayerConfigDoc = R"doc(The settings of one layer, which cannot be changed.

``HqqConfig.layer(name)`` gives the settings of a layer of a model, ``QuantizedTensor.config`` those
that a matrix was quantized with.

Args:
    nbits: 8, 6, 5, 4, 3, 2, 1.58 (three levels) or 1.
    group_size: Weights that share a scale and a zero: a multiple of 8, or None for one group per
        row (axis 1) or column (axis 0).
    axis: 1: groups lie inside rows; 0: inside columns.
    solver: 'joint', 'hqq' or 'minmax'.
    balance: 'sinkhorn', 'none', or 'auto', which a stored layer never has.
    lp_norm: Norm of the error that is minimised; None: 2 for joint, 0.7 for hqq.
    iterations: Steps of the solver; None: what suits it.
    quant_zero: Zeros are 8-bit codes.
    quant_scale: Scales are 8-bit codes.
    meta_dtype: Type of stored scales and zeros: 'float16', 'bfloat16', 'float32'.
    beta: Penalty of the half-quadratic solvers (used when lp_norm < 2).
    kappa: Growth of beta a step, where grow_beta is set.
    round_zero: Round the zero before solver 'hqq' starts; None: only at 4 bits.
    grow_beta: Multiply beta by kappa after every step of solver 'hqq'.

Raises:
    ValueError: If a value is not allowed, or for an unknown argument (naming the nearest known
        one).

Example:
    >>> config = hqq_cpp.LayerConfig(nbits=3, group_size=128)
    >>> config.nbits, config.replace(nbits=2).nbits
    (3, 2)
    >>> config == hqq_cpp.HqqConfig(nbits=3, group_size=128).layer("model.layers.0.mlp.up_proj")
    True
)doc";

constexpr const char* kLayerReplaceDoc = R"doc(A copy with other values.

Args:
    **changes: Settings by name.

Raises:
    ValueError: For an unknown setting or a value that is not allowed.

Example:
    >>> hqq_cpp.LayerConfig().replace(axis=0).axis
    0
)doc";

constexpr const char* kLayerToDictDoc = R"doc(All settings as a dict that ``json.dumps`` takes.

Example:
    >>> hqq_cpp.LayerConfig(nbits=2).to_dict()["nbits"]
    2
)doc";

constexpr const char* kLayerFromDictDoc = R"doc(Reads a dict.

Args:
    settings: As to_dict() gives it, every key optional, or upstream's settings of a layer
        (``{"weight_quant_params": ...}``).

Raises:
    ValueError: For an unknown key (naming the nearest known one) or a value that is not allowed.

Example:
    >>> hqq_cpp.LayerConfig.from_dict({"nbits": 2}) == hqq_cpp.LayerConfig(nbits=2)
    True
)doc";

LayerConfig make_layer_config(const py::kwargs& fields) {
  return layer_config_from_json(json_from_python(fields, "config"), LayerConfig{}, "config");
}

LayerConfig replace_settings(const LayerConfig& self, const py::kwargs& changes) {
  return layer_config_from_json(json_from_python(changes, "config"), self, "config");
}

LayerConfig layer_from_dict(const py::dict& settings) {
  return layer_config_from_json(json_from_python(settings, "config"), LayerConfig{}, "config");
}

py::dict layer_to_dict(const LayerConfig& self) {
  return json_to_python(layer_config_to_json(self));
}

std::string layer_text(const LayerConfig& self) { return layer_config_to_json(self).dump(); }

void bind_settings(py::class_<LayerConfig>& config) {
  config
      .def_property_readonly("nbits",
                             [](const LayerConfig& self) { return nbits_to_python(self.nbits); })
      .def_readonly("group_size", &LayerConfig::group_size)
      .def_readonly("axis", &LayerConfig::axis)
      .def_property_readonly("solver",
                             [](const LayerConfig& self) { return to_string(self.solver); })
      .def_property_readonly("balance",
                             [](const LayerConfig& self) { return to_string(self.balance); })
      .def_readonly("lp_norm", &LayerConfig::lp_norm)
      .def_readonly("iterations", &LayerConfig::iterations)
      .def_readonly("quant_zero", &LayerConfig::quant_zero)
      .def_readonly("quant_scale", &LayerConfig::quant_scale)
      .def_property_readonly(
          "meta_dtype",
          [](const LayerConfig& self) { return std::string(dtype_name(self.meta_dtype)); })
      .def_readonly("beta", &LayerConfig::beta)
      .def_readonly("kappa", &LayerConfig::kappa)
      .def_readonly("round_zero", &LayerConfig::round_zero)
      .def_readonly("grow_beta", &LayerConfig::grow_beta);
}

}  // namespace

Number nbits_to_python(BitWidth width) {
  const double nbits = nbits_of(width);
  const auto whole = static_cast<int>(nbits);
  if (whole == nbits) return py::int_(whole);
  return py::float_(nbits);
}

void bind_layer_config(py::module_& m) {
  py::class_<LayerConfig> config(m, "LayerConfig", kLayerConfigDoc);
  config
      .def(py::init([](const Number& nbits, const Optional<py::int_>& group_size,
                       const Optional<py::int_>& axis, const Name& solver, const Name& balance,
                       const Optional<py::float_>& lp_norm, const Optional<py::int_>& iterations,
                       const Bool& quant_zero, const Bool& quant_scale,
                       const py::object& meta_dtype, const Number& beta, const Number& kappa,
                       const Optional<py::bool_>& round_zero, const Bool& grow_beta,
                       const py::kwargs& unknown) {
             py::kwargs fields;
             const auto set = [&](const char* name, const py::object& value) {
               fields[name] = value;
             };
             set("nbits", nbits);
             set("group_size", group_size);
             set("axis", axis);
             set("solver", solver);
             set("balance", balance);
             set("lp_norm", lp_norm);
             set("iterations", iterations);
             set("quant_zero", quant_zero);
             set("quant_scale", quant_scale);
             set("meta_dtype", meta_dtype);
             set("beta", beta);
             set("kappa", kappa);
             set("round_zero", round_zero);
             set("grow_beta", grow_beta);
             for (const auto& [key, value] : unknown) fields[key] = value;
             return make_layer_config(fields);
           }),
           py::arg("nbits") = 4, py::arg("group_size") = 64, py::arg("axis") = 1,
           py::arg("solver") = "joint", py::arg("balance") = "auto",
           py::arg("lp_norm") = py::none(), py::arg("iterations") = py::none(),
           py::arg("quant_zero") = false, py::arg("quant_scale") = false,
           py::arg("meta_dtype") = "float16", py::arg("beta") = 10.0, py::arg("kappa") = 1.01,
           py::arg("round_zero") = py::none(), py::arg("grow_beta") = false)
      .def_static("from_dict", &layer_from_dict, py::arg("settings"), kLayerFromDictDoc)
      .def("to_dict", &layer_to_dict, kLayerToDictDoc)
      .def("replace", &replace_settings, kLayerReplaceDoc)
      .def(
          "__eq__",
          [](const LayerConfig& self, const py::object& other) {
            return py::isinstance<LayerConfig>(other) && self == other.cast<const LayerConfig&>();
          },
          py::is_operator())
      .def("__hash__", [](const LayerConfig& self) { return py::hash(py::str(layer_text(self))); })
      .def("__repr__",
           [](const LayerConfig& self) {
             return repr_of("LayerConfig", changed_fields(layer_config_to_json(self),
                                                          layer_config_to_json(LayerConfig{})));
           })
      .def("__copy__", [](const LayerConfig& self) { return self; })
      .def(
          "__deepcopy__", [](const LayerConfig& self, const py::dict&) { return self; },
          py::arg("memo"))
      .def(py::pickle([](const LayerConfig& self) { return layer_to_dict(self); },
                      &layer_from_dict));
  bind_settings(config);
}

}  // namespace hqq::python

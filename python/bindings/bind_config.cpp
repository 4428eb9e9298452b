// hqq_cpp.HqqConfig: include/hqq/config.hpp.
#include "python/bindings/config.hpp"
#include "src/config/config_json.hpp"

namespace hqq::python {
namespace {

constexpr const char* kConfigDoc = R"doc(How a model is quantized.

Every argument is an attribute that can be read and set; setting checks the value at once. Rules of
``dynamic_config`` take what they do not name from the settings at the moment they are given.

Args:
    nbits: 8, 6, 5, 4, 3, 2, 1.58 (three levels) or 1.
    group_size: Weights that share a scale and a zero: a multiple of 8, or None for one group per
        row (axis 1) or column (axis 0).
    axis: 1: groups lie inside rows; 0: inside columns, as upstream hqq groups them.
    solver: 'joint' (fits scale and zero), 'hqq' (upstream's algorithm) or 'minmax' (round to
        nearest).
    balance: 'sinkhorn' (a factor per input column), 'none', or 'auto': sinkhorn unless the layer
        has importance weights.
    lp_norm: Norm of the error that is minimised; None: 2 for joint, 0.7 for hqq.
    iterations: Steps of the solver; None: what suits it.
    quant_zero: Store zeros as 8-bit codes.
    quant_scale: Store scales as 8-bit codes.
    meta_dtype: Type of stored scales and zeros: 'float16', 'bfloat16', 'float32', or the NumPy or
        torch dtype.
    dynamic_config: Name of layers or of a parent, glob or 're:' regex -> settings that differ
        there, or None to leave the layers unquantized. Their order counts.
    skip_modules: Names of layers or of parents, globs or 're:' regexes of layers to leave as they
        are.
    beta: Penalty of the half-quadratic solvers (used when lp_norm < 2).
    kappa: Growth of beta a step, where grow_beta is set.
    round_zero: Round the zero before solver 'hqq' starts; None: only at 4 bits, like upstream.
    dynamic_only: Leave every layer unquantized that no rule names.
    grow_beta: Multiply beta by kappa after every step of solver 'hqq', as upstream's master branch
        does. Its releases do not.
    importance: Weights of the squared errors of each layer's input columns: a mapping from layer
        names to arrays [in_features], or a safetensors file of such (``hqq-cpp importance``);
        'random': collect them (quantize_model_ and from_pretrained only). Not part of
        ``to_dict()``.

Raises:
    ValueError: If a value is not allowed, or for an unknown argument (naming the nearest known
        one).

Example:
    >>> config = hqq_cpp.HqqConfig(nbits=3, dynamic_config={"mlp.down_proj": {"nbits": 6}})
    >>> config.layer("model.layers.0.mlp.down_proj").nbits
    6
    >>> config.layer("model.layers.0.self_attn.q_proj").nbits
    3
    >>> config.layer("lm_head") is None
    True
)doc";

constexpr const char* kFromDictDoc = R"doc(Reads a dict.

Args:
    config: Our own form (every key optional), that of Transformers' ``HqqConfig``, upstream's
        ``BaseQuantizeConfig`` (alone or per layer tag), a LayerConfig, an object whose
        ``to_dict()`` gives one of these, or None for the defaults.

Raises:
    ValueError: For an unknown key (naming the nearest known one) or a value that is not allowed.
    TypeError: If it is none of these.

Example:
    >>> upstream = {"weight_quant_params": {"nbits": 2, "group_size": 16, "axis": 1}}
    >>> hqq_cpp.HqqConfig.from_dict(upstream).nbits
    2
)doc";

constexpr const char* kToDictDoc =
    R"doc(All settings as a dict that ``json.dumps`` and ``from_dict`` take.

Example:
    >>> hqq_cpp.HqqConfig(nbits=2).to_dict()["nbits"]
    2
)doc";

constexpr const char* kLayerDoc = R"doc(The settings of one layer.

Args:
    name: Full name without '.weight', such as 'model.layers.0.mlp.down_proj'.
    must_be_named: Only rules that name the layer itself count, neither the defaults nor a rule for
        a parent: what decides about embeddings.

Returns:
    A LayerConfig, or None if the layer stays unquantized.

Example:
    >>> hqq_cpp.HqqConfig().layer("model.layers.0.mlp.up_proj").group_size
    64
)doc";

constexpr const char* kUnmatchedDoc =
    R"doc(What in the config fits no layer of a model: most often a typing mistake.

Args:
    layers: Full names of all matrices of the model without '.weight', also of those that stay
        dense.
    others: Names of its other weights, which skip_modules may name.
    importance: Names of importance vectors, which must be full names.

Returns:
    A sentence for each of the first eight names, with the nearest one that exists, and one that
    counts the rest.

Example:
    >>> hqq_cpp.HqqConfig(skip_modules=["q_prj"]).unmatched_names(["model.layers.0.q_proj"])
    ["skip_modules names no layer: 'q_prj'; nearest is 'q_proj'"]
)doc";

constexpr const char* kTagDoc =
    R"doc(The tag of a layer: its name without 'model', 'layers' and numbers.

Args:
    name: Full name of the layer.

Example:
    >>> hqq_cpp.layer_tag("model.layers.3.self_attn.q_proj")
    'self_attn.q_proj'
)doc";

py::object field_to_python(const HqqConfig& config, const std::string& key) {
  return json_to_python(config_to_json(config).at(key));
}

void set_layer_field(BoundConfig& config, const std::string& key, py::handle value) {
  const Json json = json_from_python(py::dict(py::arg(key.c_str()) = value), "config");
  config.defaults = layer_config_from_json(json, config.defaults, "config");
}

// Fields beside those of LayerConfig. Rules are read over the defaults as they are now.
void set_config_field(BoundConfig& config, const std::string& key, py::handle value) {
  Json json = config_to_json(config);
  json[key] = json_from_python(value, "config");
  static_cast<HqqConfig&>(config) = config_from_json(json);
}

std::vector<std::string> strings(const std::vector<Text>& texts) {
  return {texts.begin(), texts.end()};
}

using Rules = Optional<py::typing::Dict<py::str, OptionalDict>>;
using Names = Optional<py::sequence>;
using NameTuple = py::typing::Tuple<py::str, py::ellipsis>;

void set_importance(BoundConfig& config, const py::object& value) {
  const bool is_known = value.is_none() || py::isinstance<py::str>(value) ||
                        py::hasattr(value, "__fspath__") ||
                        (PyMapping_Check(value.ptr()) != 0 && py::hasattr(value, "items"));
  if (!is_known) {
    throw_invalid("config", "importance is a " + type_name(value) +
                                "; it must be a mapping from layer names to arrays, a safetensors "
                                "file, 'random' or None");
  }
  config.importance = value;
}

template <class T>
void layer_field(py::class_<BoundConfig>& config, const char* key) {
  config.def_property(
      key, [key](const BoundConfig& self) { return T(field_to_python(self, key)); },
      [key](BoundConfig& self, const T& value) { set_layer_field(self, key, value); });
}

BoundConfig make_config(const Number& nbits, const Optional<py::int_>& group_size,
                        const Optional<py::int_>& axis, const Name& solver, const Name& balance,
                        const Optional<py::float_>& lp_norm, const Optional<py::int_>& iterations,
                        const Bool& quant_zero, const Bool& quant_scale,
                        const py::object& meta_dtype, const Rules& dynamic_config,
                        const Names& skip_modules, const Number& beta, const Number& kappa,
                        const Optional<py::bool_>& round_zero, const Bool& dynamic_only,
                        const Bool& grow_beta, const py::object& importance,
                        const py::kwargs& unknown) {
  py::dict fields(py::arg("nbits") = nbits, py::arg("group_size") = group_size,
                  py::arg("axis") = axis, py::arg("solver") = solver, py::arg("balance") = balance,
                  py::arg("lp_norm") = lp_norm, py::arg("iterations") = iterations,
                  py::arg("quant_zero") = quant_zero, py::arg("quant_scale") = quant_scale,
                  py::arg("meta_dtype") = meta_dtype, py::arg("dynamic_config") = dynamic_config,
                  py::arg("skip_modules") = skip_modules, py::arg("beta") = beta,
                  py::arg("kappa") = kappa, py::arg("round_zero") = round_zero,
                  py::arg("dynamic_only") = dynamic_only, py::arg("grow_beta") = grow_beta);
  for (const auto& [key, value] : unknown) fields[key] = value;
  BoundConfig config(config_from_json(json_from_python(fields, "config")));
  set_importance(config, importance);
  return config;
}

BoundConfig from_dict(const py::object& value) {
  BoundConfig config(config_from_python(value));
  if (py::hasattr(value, "importance")) set_importance(config, value.attr("importance"));
  return config;
}

void bind_layer_fields(py::class_<BoundConfig>& config) {
  layer_field<Number>(config, "nbits");
  layer_field<Optional<py::int_>>(config, "group_size");
  layer_field<py::typing::Union<py::int_>>(config, "axis");
  layer_field<Name>(config, "solver");
  layer_field<Name>(config, "balance");
  layer_field<Optional<py::float_>>(config, "lp_norm");
  layer_field<Optional<py::int_>>(config, "iterations");
  layer_field<Bool>(config, "quant_zero");
  layer_field<Bool>(config, "quant_scale");
  layer_field<Name>(config, "meta_dtype");
  layer_field<Number>(config, "beta");
  layer_field<Number>(config, "kappa");
  layer_field<Optional<py::bool_>>(config, "round_zero");
  config.def_property(
      "grow_beta", [](const BoundConfig& self) { return self.defaults.grow_beta; },
      [](BoundConfig& self, const Bool& value) { set_layer_field(self, "grow_beta", value); },
      "Whether beta grows by kappa a step of solver 'hqq'.");
}

void bind_rules(py::class_<BoundConfig>& config) {
  // A view or a tuple: changing what the attribute gives must not look as if it changed the config.
  config.def_property(
      "dynamic_config",
      [](const BoundConfig& self) -> Rules {
        return py::module_::import("types").attr("MappingProxyType")(
            field_to_python(self, "dynamic_config"));
      },
      [](BoundConfig& self, const Rules& value) {
        set_config_field(self, "dynamic_config", value);
      },
      "Rules as a read-only mapping; assign a new dict to change them.");
  config.def_property(
      "skip_modules",
      [](const BoundConfig& self) -> NameTuple {
        return py::tuple(field_to_python(self, "skip_modules"));
      },
      [](BoundConfig& self, const Names& value) { set_config_field(self, "skip_modules", value); },
      "Layers left as they are, as a tuple; assign a new one to change them.");
  config.def_property(
      "dynamic_only", [](const BoundConfig& self) { return self.dynamic_only; },
      [](BoundConfig& self, const Bool& value) { set_config_field(self, "dynamic_only", value); },
      "Whether layers that no rule names stay unquantized.");
}

}  // namespace

py::dict changed_fields(const Json& json, const Json& defaults) {
  py::dict fields;
  for (const auto& [key, value] : json.items()) {
    if (!defaults.contains(key) || value != defaults.at(key))
      fields[py::str(key)] = json_to_python(value);
  }
  return fields;
}

HqqConfig config_from_python(py::handle value) {
  if (value.is_none()) return HqqConfig();
  if (py::isinstance<BoundConfig>(value)) return value.cast<const BoundConfig&>();
  if (py::isinstance<LayerConfig>(value)) return HqqConfig(value.cast<const LayerConfig&>());
  if (PyType_Check(value.ptr()) != 0) {
    const auto name = value.attr("__name__").cast<std::string>();
    throw_invalid("config",
                  "the config is the class " + name + "; make an object of it: " + name + "()");
  }
  if (PyMapping_Check(value.ptr()) != 0 && py::hasattr(value, "items")) {
    return config_from_json(json_from_python(value, "config"));
  }
  if (py::hasattr(value, "to_dict")) return config_from_python(value.attr("to_dict")());
  throw py::type_error("[config] a config must be an HqqConfig, a dict or None, not " +
                       type_name(value));
}

HqqConfig matrix_config_from_python(py::handle value) {
  HqqConfig config = config_from_python(value);
  if (py::isinstance<LayerConfig>(value)) config.skip_modules.clear();
  return config;
}

LayerConfig layer_config_from_python(py::handle value) {
  if (py::isinstance<LayerConfig>(value)) return value.cast<const LayerConfig&>();
  return config_from_python(value).defaults;
}

void bind_config(py::module_& m) {
  py::class_<BoundConfig> config(m, "HqqConfig", kConfigDoc);
  config
      .def(py::init(&make_config), py::arg("nbits") = 4, py::arg("group_size") = 64,
           py::arg("axis") = 1, py::arg("solver") = "joint", py::arg("balance") = "auto",
           py::arg("lp_norm") = py::none(), py::arg("iterations") = py::none(),
           py::arg("quant_zero") = false, py::arg("quant_scale") = false,
           py::arg("meta_dtype") = "float16", py::arg("dynamic_config") = py::none(),
           py::arg("skip_modules") = py::make_tuple("lm_head"), py::arg("beta") = 10.0,
           py::arg("kappa") = 1.01, py::arg("round_zero") = py::none(),
           py::arg("dynamic_only") = false, py::arg("grow_beta") = false,
           py::arg("importance") = py::none())
      .def_static("from_dict", &from_dict, py::arg("config"), kFromDictDoc)
      .def(
          "to_dict",
          [](const BoundConfig& self) { return py::dict(json_to_python(config_to_json(self))); },
          kToDictDoc)
      .def(
          "layer",
          [](const BoundConfig& self, const Text& name, bool must_be_named) {
            return self.layer(name, must_be_named);
          },
          py::arg("name"), py::arg("must_be_named") = false, kLayerDoc)
      .def(
          "unmatched_names",
          [](const BoundConfig& self, const std::vector<Text>& layers,
             const std::vector<Text>& others, const std::vector<Text>& importance) {
            const ModelNames names{strings(layers), strings(others)};
            return describe(unmatched_names(self, names, strings(importance)));
          },
          py::arg("layers"), py::arg("others") = py::list(), py::arg("importance") = py::list(),
          kUnmatchedDoc)
      .def(
          "__eq__",
          [](const BoundConfig& self, const py::object& other) {
            if (!py::isinstance<BoundConfig>(other)) return false;
            const HqqConfig& settings = self;
            return settings == other.cast<const BoundConfig&>();
          },
          py::is_operator())
      .def("__repr__",
           [](const BoundConfig& self) {
             return repr_of("HqqConfig",
                            changed_fields(config_to_json(self), config_to_json(HqqConfig())));
           })
      .def("__copy__", [](const BoundConfig& self) { return self; })
      .def(
          "__deepcopy__", [](const BoundConfig& self, const py::dict&) { return self; },
          py::arg("memo"))
      .def(py::pickle(
          [](const BoundConfig& self) {
            return py::make_tuple(config_to_json(self).dump(), self.importance);
          },
          [](const py::tuple& state) {
            BoundConfig config(HqqConfig::from_json_text(state[0].cast<std::string>()));
            set_importance(config, state[1]);
            return config;
          }));
  config.def_property(
      "importance", [](const BoundConfig& self) { return self.importance; }, &set_importance,
      "Where importance comes from: None, 'random', a path or a mapping.");
  // What Transformers asks a quantization_config for.
  config.attr("quant_method") = "hqq_cpp";

  m.def("layer_tag", [](const Text& name) { return layer_tag(name); }, py::arg("name"), kTagDoc);
  bind_layer_fields(config);
  bind_rules(config);
}

}  // namespace hqq::python

// JSON forms of HqqConfig: ours, Transformers' and upstream hqq's.
#include "src/config/config_json.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "hqq/error.hpp"
#include "hqq/version.hpp"
#include "src/base/json.hpp"
#include "src/config/config_rules.hpp"
#include "src/config/layer_match.hpp"

namespace hqq {
namespace {

// Keeps the order of keys, which is the order of rules.
using Json = nlohmann::ordered_json;

const std::vector<std::string> kLayerKeys = {
    "nbits", "group_size", "axis",      "solver",     "balance",    "lp_norm",     "iterations",
    "beta",  "kappa",      "grow_beta", "round_zero", "quant_zero", "quant_scale", "meta_dtype"};

// nbits is "four" (a string): what was given, cut to a readable length.
std::string given(const std::string& key, const Json& value) {
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (value.is_number_float() && !std::isfinite(value.get<double>())) {
    text = std::to_string(value.get<double>());  // JSON has no nan and no inf
  }
  text = cut_text(text, 60);
  std::string kind = value.type_name();
  if (value.is_null()) return key + " is null";
  return key + " is " + text + " (" + (kind == "array" || kind == "object" ? "an " : "a ") + kind +
         ")";
}

[[noreturn]] void wrong(const std::string& where, const std::string& key, const Json& value,
                        const std::string& right) {
  throw_invalid(where, given(key, value) + "; it must be " + right);
}

void expect_object(const std::string& where, const std::string& key, const Json& value) {
  if (!value.is_object()) wrong(where, key, value, "an object {...}");
}

[[noreturn]] void unknown_key(const std::string& where, const std::string& key,
                              const std::vector<std::string>& known) {
  throw_invalid(where, unknown_name_message("key", key, known));
}

bool read_bool(const std::string& where, const std::string& key, const Json& value) {
  if (!value.is_boolean()) wrong(where, key, value, "true or false");
  return value.get<bool>();
}

std::int64_t read_integer(const std::string& where, const std::string& key, const Json& value,
                          const std::string& right) {
  const bool fits = value.is_number_integer() &&
                    (!value.is_number_unsigned() ||
                     value.get<std::uint64_t>() <= std::numeric_limits<std::int64_t>::max());
  if (!fits) wrong(where, key, value, right);
  return value.get<std::int64_t>();
}

int read_int(const std::string& where, const std::string& key, const Json& value,
             const std::string& right) {
  const std::int64_t number = read_integer(where, key, value, right);
  if (number < std::numeric_limits<int>::min() || number > std::numeric_limits<int>::max()) {
    wrong(where, key, value, right);
  }
  return static_cast<int>(number);
}

double read_number(const std::string& where, const std::string& key, const Json& value,
                   const std::string& right) {
  if (!value.is_number()) wrong(where, key, value, right);
  return value.get<double>();
}

BitWidth read_nbits(const std::string& where, const Json& value) {
  const std::string right = "one of " + supported_nbits();
  const double number = read_number(where, "nbits", value, right);
  for (const BitWidth width : kAllBitWidths) {
    // People write log2(3) as 1.58, 1.585 or 1.584962...
    const double tolerance = width == BitWidth::kTernary ? 0.01 : 0.0;
    if (std::abs(number - nbits_of(width)) <= tolerance) return width;
  }
  wrong(where, "nbits", value, right);
}

template <class Enum>
Enum read_enum(const std::string& where, const std::string& key, const Json& value,
               std::initializer_list<Enum> all) {
  std::string names;
  for (const Enum one : all) {
    names += (names.empty() ? "" : ", ") + to_string(one);
    if (value.is_string() && value.get<std::string>() == to_string(one)) return one;
  }
  wrong(where, key, value, "one of " + names);
}

std::optional<std::int64_t> read_group_size(const std::string& where, const Json& value) {
  if (value.is_null()) return std::nullopt;
  return read_integer(where, "group_size", value, "a multiple of 8 from 8 up, or null");
}

// Keywords of Transformers and upstream that change nothing here, unless they ask for what we lack.
bool read_compatibility_key(const std::string& where, const std::string& key, const Json& value) {
  if (key == "view_as_float") {
    if (read_bool(where, key, value)) {
      throw_invalid(where, "view_as_float true is not supported: codes are always stored as uint8");
    }
    return true;
  }
  if (key == "offload_meta") {
    // Where upstream keeps scale and zero at run time; the values do not depend on it.
    read_bool(where, key, value);
    return true;
  }
  return false;
}

bool read_layer_key(LayerConfig& config, const std::string& where, const std::string& key,
                    const Json& value) {
  if (key == "nbits") {
    config.nbits = read_nbits(where, value);
  } else if (key == "group_size") {
    config.group_size = read_group_size(where, value);
  } else if (key == "axis") {
    // null is what Transformers' axis=None means.
    config.axis = value.is_null() ? 1 : read_int(where, key, value, "0 or 1");
  } else if (key == "solver") {
    config.solver = read_enum(where, key, value, {Solver::kMinMax, Solver::kHqq, Solver::kJoint});
  } else if (key == "balance") {
    config.balance =
        read_enum(where, key, value, {Balance::kAuto, Balance::kNone, Balance::kSinkhorn});
  } else if (key == "lp_norm") {
    config.lp_norm.reset();
    if (!value.is_null()) {
      config.lp_norm = read_number(where, key, value, "a number above 0 and at most 2, or null");
    }
  } else if (key == "iterations") {
    config.iterations.reset();
    if (!value.is_null()) {
      config.iterations = read_int(where, key, value, "an integer from 1 to 1000, or null");
    }
  } else if (key == "beta") {
    config.beta = read_number(where, key, value, "a number above 0");
  } else if (key == "kappa") {
    config.kappa = read_number(where, key, value, "a number, 1 or more");
  } else if (key == "grow_beta") {
    config.grow_beta = read_bool(where, key, value);
  } else if (key == "round_zero") {
    config.round_zero.reset();
    if (!value.is_null()) config.round_zero = read_bool(where, key, value);
  } else if (key == "quant_zero") {
    config.quant_zero = read_bool(where, key, value);
  } else if (key == "quant_scale") {
    config.quant_scale = read_bool(where, key, value);
  } else if (key == "meta_dtype") {
    const std::string right = "one of float16, bfloat16, float32";
    if (!value.is_string()) wrong(where, key, value, right);
    const std::optional<DType> dtype = dtype_from_name(value.get<std::string>());
    if (!dtype) wrong(where, key, value, right);
    config.meta_dtype = *dtype;
  } else {
    return read_compatibility_key(where, key, value);
  }
  return true;
}

bool is_upstream_layer(const Json& json) {
  return json.is_object() && json.contains("weight_quant_params");
}

bool is_upstream_per_tag(const Json& json) {
  return json.is_object() && std::any_of(json.begin(), json.end(), is_upstream_layer);
}

void read_weight_quant_params(LayerConfig& config, const std::string& where, const Json& params) {
  expect_object(where, "weight_quant_params", params);
  // What upstream's Quantizer.quantize takes for keys that are not there.
  config.nbits = BitWidth::k4;
  config.group_size = 64;
  config.axis = 0;
  config.round_zero = false;
  const std::vector<std::string> known = {"nbits",      "channel_wise", "group_size",   "optimize",
                                          "round_zero", "axis",         "view_as_float"};
  for (const auto& [key, value] : params.items()) {
    if (std::find(known.begin(), known.end(), key) == known.end()) {
      unknown_key(where + ", weight_quant_params", key, known);
    }
    if (key == "optimize") {
      if (!read_bool(where, key, value)) config.solver = Solver::kMinMax;
    } else if (key == "channel_wise") {
      if (!read_bool(where, key, value)) {
        throw_invalid(where,
                      "channel_wise false (one scale for the whole matrix) is not supported; "
                      "use true");
      }
    } else {
      read_layer_key(config, where, key, value);
    }
  }
}

// True when the metadata is to be quantized. Ours always has 8 bits and groups of 128.
bool read_meta_quant_params(const std::string& where, const std::string& name, const Json& params) {
  if (params.is_null()) return false;
  expect_object(where, name, params);
  for (const auto& [key, value] : params.items()) {
    const std::string path = name + "." + key;
    if (key == "nbits") {
      if (read_number(where, path, value, "8") != 8) wrong(where, path, value, "8");
    } else if (key == "group_size") {
      constexpr std::int64_t kBlock = 128;
      if (!value.is_null() && read_integer(where, path, value, "128 or null") != kBlock) {
        wrong(where, path, value, "128 or null");
      }
    } else if (key == "channel_wise" || key == "optimize" || key == "round_zero" ||
               key == "view_as_float") {
      read_bool(where, path, value);
    } else if (key == "axis") {
      read_int(where, path, value, "0 or 1");
    } else {
      unknown_key(where + ", " + name, key,
                  {"nbits", "channel_wise", "group_size", "optimize", "round_zero", "axis",
                   "view_as_float"});
    }
  }
  return true;
}

// {"weight_quant_params": {...}, "scale_quant_params": ..., "zero_quant_params": ...,
// "offload_meta"}
LayerConfig read_upstream_layer(const Json& json, const LayerConfig& base,
                                const std::string& where) {
  LayerConfig config = base;
  // Upstream's layers have no column scale.
  config.balance = Balance::kNone;
  for (const auto& [key, value] : json.items()) {
    if (key == "weight_quant_params") {
      read_weight_quant_params(config, where, value);
    } else if (key == "scale_quant_params") {
      config.quant_scale = read_meta_quant_params(where, key, value);
    } else if (key == "zero_quant_params") {
      config.quant_zero = read_meta_quant_params(where, key, value);
    } else if (!read_compatibility_key(where, key, value)) {
      unknown_key(
          where, key,
          {"weight_quant_params", "scale_quant_params", "zero_quant_params", "offload_meta"});
    }
  }
  validate_layer_config(config, where);
  return config;
}

void read_rules(HqqConfig& config, const Json& rules) {
  for (const auto& [key, value] : rules.items()) {
    std::optional<LayerConfig> rule;
    if (!value.is_null()) {
      rule = layer_config_from_json(value, config.defaults, rule_where(key));
    }
    config.dynamic_config.emplace_back(key, rule);
  }
}

void read_skip_modules(HqqConfig& config, const Json& value) {
  const std::string right = "an array of layer names";
  config.skip_modules.clear();
  if (value.is_null()) return;
  if (!value.is_array()) wrong("config", "skip_modules", value, right);
  for (const Json& entry : value) {
    if (!entry.is_string()) wrong("config", "an entry of skip_modules", entry, "a string");
    config.skip_modules.push_back(entry.get<std::string>());
  }
}

void read_quant_method(const Json& value) {
  if (!value.is_null() && value != "hqq" && value != "hqq_cpp") {
    wrong("config", "quant_method", value, "\"hqq_cpp\" or \"hqq\"");
  }
}

void read_quantizer(const Json& value) {
  if (value != "hqq_cpp") wrong("config", "quantizer", value, "\"hqq_cpp\"");
}

// Upstream's settings for all layers, or {tag: settings}.
void read_upstream(HqqConfig& config, const Json& json) {
  if (is_upstream_layer(json)) {
    config.defaults = read_upstream_layer(json, LayerConfig{}, "config");
    return;
  }
  if (json.empty()) throw_invalid("config", "quant_config is empty: it names no layer to quantize");
  config.dynamic_only = true;
  config.defaults.balance = Balance::kNone;
  read_rules(config, json);
}

// {"quant_config": ..., "quant_method": "hqq", "skip_modules": [...]}
void read_transformers(HqqConfig& config, const Json& json) {
  for (const auto& [key, value] : json.items()) {
    if (key == "quant_config") {
      expect_object("config", key, value);
      read_upstream(config, value);
    } else if (key == "skip_modules") {
      read_skip_modules(config, value);
    } else if (key == "quant_method") {
      read_quant_method(value);
    } else {
      unknown_key("config", key, {"quant_config", "skip_modules", "quant_method"});
    }
  }
}

void read_own(HqqConfig& config, const Json& json) {
  for (const auto& [key, value] : json.items()) {
    if (read_layer_key(config.defaults, "config", key, value)) continue;
    if (key == "skip_modules") {
      read_skip_modules(config, value);
    } else if (key == "dynamic_only") {
      config.dynamic_only = read_bool("config", key, value);
    } else if (key == "quant_method") {
      read_quant_method(value);
    } else if (key == "quantizer") {
      read_quantizer(value);
    } else if (key == "format_version") {
      // In the config.json of a quantized checkpoint, as are quantizer and not_quantized (what the
      // rules left out).
      if (value != kFormatVersion) wrong("config", key, value, std::to_string(kFormatVersion));
    } else if (key != "dynamic_config" && key != "not_quantized") {
      std::vector<std::string> known = kLayerKeys;
      known.insert(known.end(), {"dynamic_config", "skip_modules", "dynamic_only", "quant_method",
                                 "quantizer", "quant_config", "weight_quant_params",
                                 "view_as_float", "format_version", "not_quantized"});
      unknown_key("config", key, known);
    }
  }
  // Last, because rules start from the defaults wherever those stand in the text.
  const auto rules = json.find("dynamic_config");
  if (rules == json.end() || rules->is_null()) return;
  expect_object("config", "dynamic_config", *rules);
  read_rules(config, *rules);
}

}  // namespace

Json layer_config_to_json(const LayerConfig& config) {
  Json json;
  const double nbits = nbits_of(config.nbits);
  if (nbits == std::floor(nbits)) {
    json["nbits"] = static_cast<int>(nbits);
  } else {
    json["nbits"] = nbits;
  }
  const auto optional = [](const auto& value) { return value ? Json(*value) : Json(nullptr); };
  json["group_size"] = optional(config.group_size);
  json["axis"] = config.axis;
  json["solver"] = to_string(config.solver);
  json["balance"] = to_string(config.balance);
  json["lp_norm"] = optional(config.lp_norm);
  json["iterations"] = optional(config.iterations);
  json["beta"] = config.beta;
  json["kappa"] = config.kappa;
  // Only where it is set: earlier versions do not know the key.
  if (config.grow_beta) json["grow_beta"] = true;
  json["round_zero"] = optional(config.round_zero);
  json["quant_zero"] = config.quant_zero;
  json["quant_scale"] = config.quant_scale;
  json["meta_dtype"] = std::string(dtype_name(config.meta_dtype));
  return json;
}

LayerConfig layer_config_from_json(const Json& json, const LayerConfig& base,
                                   const std::string& where) {
  if (is_upstream_layer(json)) return read_upstream_layer(json, base, where);
  if (!json.is_object()) throw_invalid(where, given("it", json) + "; it must be an object {...}");
  LayerConfig config = base;
  for (const auto& [key, value] : json.items()) {
    if (!read_layer_key(config, where, key, value)) unknown_key(where, key, kLayerKeys);
  }
  validate_layer_config(config, where);
  return config;
}

HqqConfig config_from_json(const Json& json) {
  if (!json.is_object())
    throw_invalid("config", given("it", json) + "; it must be an object {...}");
  HqqConfig config;
  if (json.contains("quant_config")) {
    read_transformers(config, json);
  } else if (is_upstream_layer(json) || is_upstream_per_tag(json)) {
    read_upstream(config, json);
  } else {
    read_own(config, json);
  }
  config.validate();
  return config;
}

HqqConfig HqqConfig::from_json_text(const std::string& text) {
  return config_from_json(parse_config_json(text, "config"));
}

std::string HqqConfig::to_json_text() const { return config_to_json(*this).dump(); }

Json config_to_json(const HqqConfig& config) {
  Json json = layer_config_to_json(config.defaults);
  Json rules = Json::object();
  for (const auto& [key, rule] : config.dynamic_config) {
    rules[key] = rule ? layer_config_to_json(*rule) : Json(nullptr);
    // A rule starts from the defaults.
    if (rule && config.defaults.grow_beta) rules[key]["grow_beta"] = rule->grow_beta;
  }
  json["dynamic_config"] = rules;
  json["skip_modules"] = config.skip_modules;
  json["dynamic_only"] = config.dynamic_only;
  return json;
}

}  // namespace hqq

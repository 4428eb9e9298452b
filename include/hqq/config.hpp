// HqqConfig: how a model is quantized; LayerConfig: the settings of one layer after matching.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "hqq/bit_width.hpp"
#include "hqq/dtype.hpp"

namespace hqq {

// kMinMax: round to nearest from min/max. kHqq: upstream's algorithm (zero only). kJoint:
// half-quadratic in scale and zero (docs/solver.md).
enum class Solver { kMinMax, kHqq, kJoint };
// kAuto: sinkhorn, but none when the layer has importance weights (they serve the same end better).
enum class Balance { kAuto, kNone, kSinkhorn };

std::string to_string(Solver solver);
std::string to_string(Balance balance);

// All settings of one layer.
struct LayerConfig {
  BitWidth nbits = BitWidth::k4;
  // Weights a group has; nullopt: one group per row (axis 1) or per column (axis 0).
  std::optional<std::int64_t> group_size = 64;
  int axis = 1;
  Solver solver = Solver::kJoint;
  Balance balance = Balance::kAuto;
  // Norm of the error that is minimised: |x|^lp_norm. Unset: 2 for joint, 0.7 for hqq.
  std::optional<double> lp_norm;
  // Unset: 20 for hqq; for joint the number of refits that docs/solver.md derives.
  std::optional<int> iterations;
  // Half-quadratic penalty, used when lp_norm < 2.
  double beta = 10.0;
  // Its growth a step in solver "hqq". Upstream's releases take it and never apply it, its master
  // branch does: grow_beta.
  double kappa = 1.01;
  bool grow_beta = false;
  // Round the zero point before solver "hqq" starts. Unset: upstream's rule, only at 4 bits.
  std::optional<bool> round_zero;
  // Store zero / scale as 8-bit codes.
  bool quant_zero = false;
  bool quant_scale = false;
  // Type of stored scale, zero and col_scale: float16, bfloat16 or float32.
  DType meta_dtype = DType::kF16;

  double effective_lp_norm() const { return lp_norm.value_or(solver == Solver::kHqq ? 0.7 : 2.0); }
  int effective_iterations() const { return iterations.value_or(solver == Solver::kHqq ? 20 : 1); }
  bool effective_round_zero() const { return round_zero.value_or(nbits == BitWidth::k4); }

  // Throws std::invalid_argument naming the field, its value and what is allowed.
  void validate() const;

  friend bool operator==(const LayerConfig&, const LayerConfig&) = default;
};

// Names of a layer: "model.layers.3.self_attn.q_proj" has the tag "self_attn.q_proj": the path
// without the components "model", "layers" and numbers.
std::string layer_tag(const std::string& layer_name);

class HqqConfig {
 public:
  // Settings of every layer that no rule names.
  LayerConfig defaults;
  // Rules, in the order they were given: a name, a glob ("*.mlp.experts.*") or a regex ("re:...",
  // ECMAScript without back-references) of the full layer name -> settings for the matching layers
  // (a full LayerConfig: defaults with the rule's fields replaced). nullopt as the value: leave
  // these layers unquantized. A name is any run of whole components of the layer's name or tag:
  // that of the layer
  // ("mlp.down_proj") or of a parent ("vision_tower", "model.layers.0"), which covers all below it.
  // A full name wins over skip_modules, that over other names, those over patterns. Among names
  // that of the layer wins over a parent's, then the one of most components; else the first given.
  std::vector<std::pair<std::string, std::optional<LayerConfig>>> dynamic_config;
  // Names (as above), globs or "re:" patterns of layers that stay as they are.
  std::vector<std::string> skip_modules = {"lm_head"};
  // Upstream's rule for per-tag configs: a layer that no key of dynamic_config names stays
  // unquantized.
  bool dynamic_only = false;

  HqqConfig() = default;
  explicit HqqConfig(const LayerConfig& defaults) : defaults(defaults) {}

  // The settings of a layer ("model.layers.0.mlp.down_proj", no ".weight"), or nullopt if it is
  // skipped. `must_be_named`: neither the defaults nor a rule for a parent count, as for
  // embeddings.
  std::optional<LayerConfig> layer(const std::string& layer_name, bool must_be_named = false) const;

  // Throws std::invalid_argument when a field or rule is invalid.
  void validate() const;

  // Reads our own form (every key optional), Transformers' HqqConfig forms (keywords, or
  // {"quant_config": {"weight_quant_params": ...}, "skip_modules", "quant_method"}) and upstream's
  // BaseQuantizeConfig form, alone or per tag. The last two mean balance none, and settings per tag
  // mean dynamic_only. An unknown key throws std::invalid_argument naming it and the nearest known
  // key. The order of dynamic_config counts.
  static HqqConfig from_json_text(const std::string& text);
  // Our own form, in one line; from_json_text() gives an equal config.
  std::string to_json_text() const;

  friend bool operator==(const HqqConfig&, const HqqConfig&) = default;
};

// The weights of a model by the names of their layers (no ".weight").
struct ModelNames {
  std::vector<std::string> layers;  // all matrices, also those that stay dense
  std::vector<std::string> others;  // norms, biases: skip_modules may name them, rules have no use
};

// A name in a config that fits nothing in a model: most often a typing mistake.
struct UnmatchedName {
  std::string where;  // "dynamic_config", "skip_modules" or "importance"
  std::string name;
  std::string nearest;  // what may have been meant; empty when there is nothing to compare with
};

// Rules, entries of skip_modules and names of importance vectors (full layer names) that fit
// nothing, in their order. "lm_head" in skip_modules is no mistake: models with tied weights have
// none. `nearest` is known for the first eight.
std::vector<UnmatchedName> unmatched_names(const HqqConfig& config, const ModelNames& model,
                                           const std::vector<std::string>& importance = {});
// A sentence each, "skip_modules names no layer: 'q_prj'; nearest is 'q_proj'", for the first
// eight, and one with the number of the others.
std::vector<std::string> describe(const std::vector<UnmatchedName>& names);

}  // namespace hqq

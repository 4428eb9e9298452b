#include "hqq/config.hpp"

#include <algorithm>
#include <cmath>
#include <set>
#include <sstream>

#include "hqq/error.hpp"
#include "src/base/quoted_text.hpp"
#include "src/config/config_rules.hpp"
#include "src/config/layer_match.hpp"
#include "src/config/layer_regex.hpp"

namespace hqq {
namespace {

template <class T>
std::string text_of(const T& value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

using Rule = std::pair<std::string, std::optional<LayerConfig>>;

// The rule whose name fits a layer best: its own before a parent's, then the longest, then the
// first.
const Rule* closest_rule(const std::vector<Rule>& rules, const std::string& layer_name,
                         const std::string& tag, NameFit least) {
  const Rule* closest = nullptr;
  std::pair<NameFit, std::ptrdiff_t> most{NameFit::kNone, -1};
  for (const Rule& rule : rules) {
    const NameFit fit = name_fit(rule.first, layer_name, tag);
    if (fit < least) continue;
    const std::pair rank{fit, std::count(rule.first.begin(), rule.first.end(), '.')};
    if (rank <= most) continue;
    most = rank;
    closest = &rule;
  }
  return closest;
}

void check_regex_count(const HqqConfig& config) {
  const auto is_regex = [](const std::string& pattern) {
    return pattern_kind(pattern) == PatternKind::kRegex;
  };
  auto count = std::count_if(config.skip_modules.begin(), config.skip_modules.end(), is_regex);
  count += std::count_if(config.dynamic_config.begin(), config.dynamic_config.end(),
                         [&](const Rule& rule) { return is_regex(rule.first); });
  if (static_cast<std::size_t>(count) > kMaxRegexes) {
    throw_invalid("config", "it has " + std::to_string(count) + " regular expressions, more than " +
                                "the " + std::to_string(kMaxRegexes) +
                                " allowed; names and globs have no limit");
  }
}

}  // namespace

std::string to_string(Solver solver) {
  switch (solver) {
    case Solver::kMinMax:
      return "minmax";
    case Solver::kHqq:
      return "hqq";
    case Solver::kJoint:
      return "joint";
  }
  throw_invalid("config", "there is no solver number " + text_of(static_cast<int>(solver)));
}

std::string to_string(Balance balance) {
  switch (balance) {
    case Balance::kAuto:
      return "auto";
    case Balance::kNone:
      return "none";
    case Balance::kSinkhorn:
      return "sinkhorn";
  }
  throw_invalid("config", "there is no balance number " + text_of(static_cast<int>(balance)));
}

void validate_layer_config(const LayerConfig& config, const std::string& where) {
  if (config.group_size && (*config.group_size < 8 || *config.group_size % 8 != 0)) {
    throw_invalid(where,
                  "group_size is " + text_of(*config.group_size) +
                      "; it must be a multiple of 8 from 8 up, or null for one group per row");
  }
  if (config.axis != 0 && config.axis != 1) {
    throw_invalid(where, "axis is " + text_of(config.axis) + "; it must be 0 or 1");
  }
  if (config.lp_norm) {
    const double most = config.solver == Solver::kHqq ? 1.0 : 2.0;
    // Written so that NaN fails.
    if (!(*config.lp_norm > 0 && *config.lp_norm <= most)) {
      throw_invalid(where, "lp_norm is " + text_of(*config.lp_norm) +
                               "; it must be above 0 and at most " + text_of(most) +
                               " for solver " + to_string(config.solver));
    }
  }
  if (config.iterations && (*config.iterations < 1 || *config.iterations > 1000)) {
    throw_invalid(where,
                  "iterations is " + text_of(*config.iterations) + "; it must be from 1 to 1000");
  }
  if (!(config.beta > 0) || !std::isfinite(config.beta)) {
    throw_invalid(where,
                  "beta is " + text_of(config.beta) + "; it must be a finite number above 0");
  }
  if (!(config.kappa >= 1) || !std::isfinite(config.kappa)) {
    throw_invalid(where,
                  "kappa is " + text_of(config.kappa) + "; it must be a finite number, 1 or more");
  }
  if (config.meta_dtype != DType::kF16 && config.meta_dtype != DType::kBF16 &&
      config.meta_dtype != DType::kF32) {
    throw_invalid(where, "meta_dtype is " + std::string(dtype_name(config.meta_dtype)) +
                             "; it must be float16, bfloat16 or float32");
  }
  // Enumerations can hold any number when they come from a cast.
  if (std::find(std::begin(kAllBitWidths), std::end(kAllBitWidths), config.nbits) ==
      std::end(kAllBitWidths)) {
    throw_invalid(where, "nbits must be one of " + supported_nbits());
  }
  to_string(config.solver);
  to_string(config.balance);
}

std::string rule_where(const std::string& key) { return "config, rule " + quote_name(key); }

void LayerConfig::validate() const { validate_layer_config(*this, "config"); }

std::string layer_tag(const std::string& layer_name) {
  std::string tag;
  for (std::size_t begin = 0; begin <= layer_name.size();) {
    const std::size_t end = std::min(layer_name.find('.', begin), layer_name.size());
    const std::string component = layer_name.substr(begin, end - begin);
    const bool is_number =
        !component.empty() && component.find_first_not_of("0123456789") == std::string::npos;
    if (!is_number && component != "model" && component != "layers") {
      if (!tag.empty()) tag += '.';
      tag += component;
    }
    begin = end + 1;
  }
  return tag;
}

std::optional<LayerConfig> HqqConfig::layer(const std::string& layer_name,
                                            bool must_be_named) const {
  for (const auto& [key, rule] : dynamic_config) {
    if (key == layer_name) return rule;
  }
  const std::string tag = layer_tag(layer_name);
  for (const std::string& entry : skip_modules) {
    if (skip_matches(entry, layer_name, tag)) return std::nullopt;
  }
  const NameFit least = must_be_named ? NameFit::kLayer : NameFit::kParent;
  if (const Rule* rule = closest_rule(dynamic_config, layer_name, tag, least)) return rule->second;
  for (const auto& [key, rule] : dynamic_config) {
    if (pattern_matches(key, layer_name)) return rule;
  }
  if (dynamic_only || must_be_named) return std::nullopt;
  return defaults;
}

void HqqConfig::validate() const {
  defaults.validate();
  check_regex_count(*this);
  std::set<std::string> seen;
  for (const auto& [key, rule] : dynamic_config) {
    validate_pattern(key, "config");
    if (!seen.insert(key).second) throw_invalid(rule_where(key), "given twice in dynamic_config");
    if (rule) validate_layer_config(*rule, rule_where(key));
  }
  for (const std::string& entry : skip_modules) validate_pattern(entry, "config");
}

}  // namespace hqq

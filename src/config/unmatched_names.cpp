#include "src/config/unmatched_names.hpp"

#include <algorithm>
#include <limits>
#include <set>
#include <string_view>
#include <unordered_set>

#include "hqq/config.hpp"
#include "src/base/quoted_text.hpp"
#include "src/config/layer_match.hpp"

namespace hqq {
namespace {

// A warning lists so many; more are a wrong model rather than typing mistakes.
constexpr std::size_t kMaxShown = 8;
// Length of a name that is looked for; the work grows with it.
constexpr std::size_t kMaxWanted = 80;

std::size_t next_dot(const std::string& name, std::size_t begin) {
  return std::min(name.find('.', begin), name.size());
}

// name itself and everything above it.
void add_parents(const std::string& name, std::set<std::string>& names) {
  std::string path = name;
  // What is known already has its parents.
  while (!path.empty() && names.insert(path).second) {
    const std::size_t dot = path.rfind('.');
    path.resize(dot == std::string::npos ? 0 : dot);
  }
}

void add_runs(const std::string& tag, std::set<std::string>& names) {
  for (std::size_t begin = 0; begin < tag.size(); begin = next_dot(tag, begin) + 1) {
    for (std::size_t end = begin; end < tag.size();) {
      end = next_dot(tag, end + 1);
      names.insert(tag.substr(begin, end - begin));
    }
  }
}

// The longest part of a glob or regex that could stand in a name.
std::string literal_part(const std::string& pattern) {
  constexpr std::string_view kNameCharacters =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.";
  const bool is_regex = pattern_kind(pattern) == PatternKind::kRegex;
  std::string longest, part;
  for (std::size_t i = is_regex ? 3 : 0; i <= pattern.size(); ++i) {
    if (i < pattern.size() && pattern[i] == '\\') continue;
    if (i < pattern.size() && kNameCharacters.find(pattern[i]) != std::string_view::npos) {
      part += pattern[i];
      continue;
    }
    while (part.ends_with('.')) part.pop_back();
    part.erase(0, std::min(part.find_first_not_of('.'), part.size()));
    if (part.size() > longest.size()) longest = part;
    part.clear();
  }
  return longest;
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

std::size_t common_start(const std::string& a, const std::string& b) {
  const auto [end, other] = std::mismatch(a.begin(), a.end(), b.begin(), b.end());
  return static_cast<std::size_t>(end - a.begin());
}

// Layers in a form that answers quickly for many names.
class LayerIndex {
 public:
  explicit LayerIndex(const std::vector<std::string>& names)
      : names_(names), exact_(names.begin(), names.end()) {
    tags_.reserve(names.size());
    for (const std::string& name : names) tags_.push_back(layer_tag(name));
  }

  bool has(const std::string& name) const { return exact_.contains(name); }
  bool has_rule(const std::string& key) const {
    return has(key) || any([&](const std::string& name, const std::string& tag) {
             return name_fit(key, name, tag) != NameFit::kNone || pattern_matches(key, name);
           });
  }
  bool has_skip(const std::string& entry) const {
    return has(entry) || any([&](const std::string& name, const std::string& tag) {
             return skip_matches(entry, name, tag);
           });
  }

 private:
  template <class Fits>
  bool any(const Fits& fits) const {
    for (std::size_t i = 0; i < names_.size(); ++i) {
      if (fits(names_[i], tags_[i])) return true;
    }
    return false;
  }

  const std::vector<std::string>& names_;
  std::unordered_set<std::string> exact_;
  std::vector<std::string> tags_;
};

}  // namespace

std::vector<std::string> names_for_rules(const std::vector<std::string>& layers) {
  std::set<std::string> paths, parts, tags;
  for (const std::string& layer : layers) {
    add_parents(layer, paths);
    tags.insert(layer_tag(layer));
  }
  for (const std::string& tag : tags) add_runs(tag, parts);
  std::vector<std::string> names(parts.begin(), parts.end());
  for (const std::string& path : paths) {
    if (!parts.contains(path)) names.push_back(path);
  }
  return names;
}

std::string nearest_name(const std::string& name, const std::vector<std::string>& candidates) {
  const std::string wanted =
      cut_text(pattern_kind(name) == PatternKind::kExact ? name : literal_part(name), kMaxWanted);
  if (wanted.empty()) return "";
  const std::string *nearest = nullptr, *shortest_around = nullptr;
  std::size_t best = std::numeric_limits<std::size_t>::max(), best_start = 0;
  for (const std::string& candidate : candidates) {
    if (contains(candidate, wanted) &&
        (shortest_around == nullptr || candidate.size() < shortest_around->size())) {
      shortest_around = &candidate;
    }
    const std::size_t longer = std::max(candidate.size(), wanted.size());
    if (longer - std::min(candidate.size(), wanted.size()) > best) continue;
    const std::size_t distance = edit_distance(wanted, candidate);
    const std::size_t start = common_start(wanted, candidate);
    if (distance > best || (distance == best && start <= best_start)) continue;
    best = distance;
    best_start = start;
    nearest = &candidate;
  }
  // A few wrong letters, or the beginning of a name: "vision" means vision_tower.
  const bool is_typo = best <= 1 + wanted.size() / 5;
  if (!is_typo && shortest_around != nullptr) return *shortest_around;
  return nearest == nullptr ? "" : *nearest;
}

std::vector<UnmatchedName> unmatched_names(const HqqConfig& config, const ModelNames& model,
                                           const std::vector<std::string>& importance) {
  const LayerIndex layers(model.layers), others(model.others);
  std::vector<UnmatchedName> unmatched;
  for (const auto& [key, rule] : config.dynamic_config) {
    if (!layers.has_rule(key)) unmatched.push_back({"dynamic_config", key, ""});
  }
  for (const std::string& entry : config.skip_modules) {
    if (entry == "lm_head" || layers.has_skip(entry) || others.has_skip(entry)) continue;
    unmatched.push_back({"skip_modules", entry, ""});
  }
  for (const std::string& name : importance) {
    if (!layers.has(name)) unmatched.push_back({"importance", name, ""});
  }
  if (unmatched.empty()) return unmatched;
  const std::vector<std::string> rules = names_for_rules(model.layers);
  for (std::size_t i = 0; i < std::min(kMaxShown, unmatched.size()); ++i) {
    UnmatchedName& one = unmatched[i];
    one.nearest = nearest_name(one.name, one.where == "importance" ? model.layers : rules);
  }
  return unmatched;
}

std::vector<std::string> describe(const std::vector<UnmatchedName>& names) {
  std::vector<std::string> sentences;
  for (const UnmatchedName& name : names) {
    if (sentences.size() == kMaxShown) {
      sentences.push_back(std::to_string(names.size() - kMaxShown) +
                          " more names fit no layer either");
      break;
    }
    std::string sentence = name.where + " names no layer: " + quote_name(name.name);
    if (!name.nearest.empty()) sentence += "; nearest is " + quote_name(name.nearest);
    sentences.push_back(sentence);
  }
  return sentences;
}

}  // namespace hqq

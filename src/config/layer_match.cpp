#include "src/config/layer_match.hpp"

#include <algorithm>
#include <string_view>

#include "hqq/config.hpp"
#include "hqq/error.hpp"
#include "src/base/quoted_text.hpp"
#include "src/config/layer_regex.hpp"
#include "src/model/role_names.hpp"

namespace hqq {
namespace {

constexpr std::string_view kRegexPrefix = "re:";
// Index of the ']' that closes the set opened at `open`, npos if none does. A ']' that comes first
// belongs to the set.
std::size_t set_end(const std::string& glob, std::size_t open) {
  std::size_t at = open + 1;
  if (at < glob.size() && glob[at] == '!') ++at;
  return glob.find(']', at + 1);
}

bool set_contains(std::string_view set, char c) {
  const bool negated = !set.empty() && set[0] == '!';
  if (negated) set.remove_prefix(1);
  bool found = false;
  for (std::size_t i = 0; i < set.size(); ++i) {
    if (i + 2 < set.size() && set[i + 1] == '-') {
      found = found || (set[i] <= c && c <= set[i + 2]);
      i += 2;
    } else {
      found = found || set[i] == c;
    }
  }
  return found != negated;
}

bool begins_with_number(const std::string& name) {
  const std::string first = name.substr(0, name.find('.'));
  return !first.empty() && first.find_first_not_of("0123456789") == std::string::npos;
}

// How a run of components fits a path: the last place where it stands between dots decides.
NameFit run_fit(const std::string& run, const std::string& path) {
  if (run.size() > path.size()) return NameFit::kNone;
  const bool from_root = begins_with_number(run);
  for (std::size_t at = path.rfind(run); at != std::string::npos; at = path.rfind(run, at - 1)) {
    const std::size_t end = at + run.size();
    const bool begins = at == 0 || (path[at - 1] == '.' && !from_root);
    if (begins && end == path.size()) return NameFit::kLayer;
    if (begins && path[end] == '.') return NameFit::kParent;
    if (at == 0) break;
  }
  return NameFit::kNone;
}

}  // namespace

PatternKind pattern_kind(const std::string& pattern) {
  if (std::string_view(pattern).starts_with(kRegexPrefix)) return PatternKind::kRegex;
  const bool is_glob = pattern.find_first_of("*?[") != std::string::npos;
  return is_glob ? PatternKind::kGlob : PatternKind::kExact;
}

void validate_pattern(const std::string& pattern, const std::string& where) {
  if (pattern.empty()) throw_invalid(where, "a layer name or pattern must not be empty");
  if (!is_utf8(pattern)) {
    throw_invalid(where, "layer name or pattern " + quote_name(pattern) +
                             " is not UTF-8, which names of tensors are");
  }
  switch (pattern_kind(pattern)) {
    case PatternKind::kExact:
      return;
    case PatternKind::kGlob:
      for (std::size_t i = 0; i < pattern.size(); ++i) {
        if (pattern[i] != '[') continue;
        i = set_end(pattern, i);
        if (i == std::string::npos) {
          throw_invalid(where, "glob " + quote_name(pattern) + " has a '[' without its ']'");
        }
      }
      return;
    case PatternKind::kRegex:
      validate_regex(pattern, where);
  }
}

bool pattern_matches(const std::string& pattern, const std::string& layer_name) {
  switch (pattern_kind(pattern)) {
    case PatternKind::kExact:
      return false;
    case PatternKind::kGlob:
      return glob_matches(pattern, layer_name);
    case PatternKind::kRegex:
      return regex_matches(pattern, layer_name);
  }
  return false;
}

// Going back to the last '*' alone is enough, so this needs no recursion and at most
// |glob| * |text| steps.
bool glob_matches(const std::string& glob, const std::string& text) {
  std::size_t g = 0, t = 0;
  std::size_t star = std::string::npos, star_text = 0;
  while (t < text.size()) {
    std::size_t next = std::string::npos;
    if (g < glob.size()) {
      if (glob[g] == '*') {
        star = g++;
        star_text = t;
        continue;
      }
      const std::size_t end = glob[g] == '[' ? set_end(glob, g) : std::string::npos;
      if (end != std::string::npos) {
        const std::string_view set(glob.data() + g + 1, end - g - 1);
        if (set_contains(set, text[t])) next = end + 1;
      } else if (glob[g] == '?' || glob[g] == text[t]) {
        next = g + 1;
      }
    }
    if (next != std::string::npos) {
      g = next;
      ++t;
    } else if (star != std::string::npos) {
      g = star + 1;
      t = ++star_text;
    } else {
      return false;
    }
  }
  return glob.find_first_not_of('*', g) == std::string::npos;
}

NameFit name_fit(const std::string& name, const std::string& layer_name, const std::string& tag) {
  if (pattern_kind(name) != PatternKind::kExact) return NameFit::kNone;
  return std::max(run_fit(name, layer_name), run_fit(name, tag));
}

bool skip_matches(const std::string& entry, const std::string& layer_name, const std::string& tag) {
  if (pattern_kind(entry) != PatternKind::kExact) return pattern_matches(entry, layer_name);
  return entry == last_component(layer_name) || name_fit(entry, layer_name, tag) != NameFit::kNone;
}

std::size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, replaced});
    }
  }
  return row[b.size()];
}

std::string unknown_name_message(const std::string& what, const std::string& name,
                                 const std::vector<std::string>& known) {
  // A hostile file may hold a key of megabytes.
  const std::string shown = cut_text(name, 80);
  std::string message = "unknown " + what + " " + quote_name(shown);
  const auto nearest =
      std::min_element(known.begin(), known.end(), [&](const auto& a, const auto& b) {
        return edit_distance(shown, a) < edit_distance(shown, b);
      });
  if (nearest == known.end()) return message;
  message += "; did you mean " + quote_name(*nearest) + "?";
  if (edit_distance(shown, *nearest) * 2 > nearest->size()) {
    message += " Known are:";
    for (std::size_t i = 0; i < known.size(); ++i) message += (i == 0 ? " " : ", ") + known[i];
  }
  return message;
}

}  // namespace hqq

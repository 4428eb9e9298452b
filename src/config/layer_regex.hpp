// Regular expressions for layer names: ECMAScript's syntax on PCRE2, with limits on their work.
#pragma once

#include <cstddef>
#include <string>

namespace hqq {

// Expressions of one config: all stay compiled while layers are matched.
inline constexpr std::size_t kMaxRegexes = 1000;

// `pattern` is "re:" and an expression. Throws std::invalid_argument for one that is no valid
// ECMAScript, has back-references, or is too large.
void validate_regex(const std::string& pattern, const std::string& where);

// Whether the expression matches the whole name. Throws std::invalid_argument where that takes more
// work than the limit, or the name is too long.
bool regex_matches(const std::string& pattern, const std::string& name);

}  // namespace hqq

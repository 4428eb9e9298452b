// How names in a config select layers: exact names and tags, globs, "re:" regular expressions.
#pragma once

#include <string>
#include <vector>

namespace hqq {

enum class PatternKind { kExact, kGlob, kRegex };

// "re:..." is a regex; a name with '*', '?' or '[' a glob; anything else is taken literally.
PatternKind pattern_kind(const std::string& pattern);

// Throws std::invalid_argument for an empty pattern, an unclosed '[' of a glob, and a regex that is
// invalid or longer than 500 characters.
void validate_pattern(const std::string& pattern, const std::string& where);

// Whether a glob or regex matches the whole layer name; false for exact patterns.
bool pattern_matches(const std::string& pattern, const std::string& layer_name);
// '*': any run of characters, '?': one character, "[a-z]" / "[!a-z]": one (not) of a set.
bool glob_matches(const std::string& glob, const std::string& text);
// Whether an entry of skip_modules selects a layer: by full name, tag, last path component or
// pattern.
bool skip_matches(const std::string& entry, const std::string& layer_name);

// Insertions, deletions and replacements that turn one string into the other.
std::size_t edit_distance(const std::string& a, const std::string& b);
// "unknown key 'nbit'; did you mean 'nbits'?", and all of `known` when nothing is near.
std::string unknown_name_message(const std::string& what, const std::string& name,
                                 const std::vector<std::string>& known);

}  // namespace hqq

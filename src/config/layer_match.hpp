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

// How a name that is no pattern fits a layer. The later, the closer.
enum class NameFit { kNone, kParent, kLayer };

// The components of `name` must be a run of those of the layer's name or of its tag, up to the end
// (kLayer) or before it (kParent). One that begins with a number is a path from the root: "0" says
// nothing about "layers.0". kNone for patterns.
NameFit name_fit(const std::string& name, const std::string& layer_name, const std::string& tag);
// Whether an entry of skip_modules selects a layer: by a name that fits, its last component or a
// pattern.
bool skip_matches(const std::string& entry, const std::string& layer_name, const std::string& tag);

// Insertions, deletions and replacements that turn one string into the other.
std::size_t edit_distance(const std::string& a, const std::string& b);
// "unknown key 'nbit'; did you mean 'nbits'?", and all of `known` when nothing is near.
std::string unknown_name_message(const std::string& what, const std::string& name,
                                 const std::vector<std::string>& known);

}  // namespace hqq

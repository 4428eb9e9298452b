// Changes of one member in JSON text. Every other byte stays as it is: numbers beyond 64 bits, NaN,
// escapes, the order of keys and the white space of somebody else's file.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace hqq {

// `text` with the member at `path`, such as {"metadata", "total_size"}, set to `value`. A new
// member comes last, on lines of its own. What is no object on the way becomes one; empty text
// counts as {}. Throws FormatError ("[<where>] ...") for text that parse_python_json refuses or
// that is no object.
std::string set_json_member(const std::string& text, const std::vector<std::string>& path,
                            const nlohmann::ordered_json& value, const std::string& where);

// `text` without a member of its outermost object: the inverse of setting one that was not there.
std::string remove_json_member(const std::string& text, const std::string& key,
                               const std::string& where);

}  // namespace hqq

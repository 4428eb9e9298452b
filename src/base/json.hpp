// The one parser of JSON that comes from outside, with limits: files and texts may be hostile.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "src/base/quoted_text.hpp"

namespace hqq {

// Objects and arrays inside each other.
inline constexpr int kMaxJsonDepth = 64;
// Bytes of a document: an index of a million tensors fits, and any config.
inline constexpr std::size_t kMaxJsonBytes = 100'000'000;
inline constexpr std::size_t kMaxConfigBytes = 16'000'000;

// Parses one JSON document; keys stay in order. Throws FormatError ("[<where>] ...") with the byte
// position for anything that is not JSON and for numbers beyond a double, and for a duplicate key
// or a limit that is exceeded. Integers beyond 64 bits read as doubles.
nlohmann::ordered_json parse_json(const std::string& text, const std::string& where);

// Parses text that Python's json module wrote (config.json, an index), which is only looked
// up here and otherwise carried over as text (json_edit.hpp): NaN, Infinity, -Infinity and numbers
// beyond a double are let pass and read as null.
nlohmann::ordered_json parse_python_json(const std::string& text, const std::string& where);

// parse_json for settings that a user wrote, of up to kMaxConfigBytes: errors are
// std::invalid_argument, but no FormatError.
nlohmann::ordered_json parse_config_json(const std::string& text, const std::string& where);

// The reason inside a message of nlohmann/json, without the input that it quotes.
std::string json_error_reason(const std::string& what);

// Position after the string that begins at `at` (a quote); the end of the text if it has none.
std::size_t json_string_end(std::string_view text, std::size_t at);

}  // namespace hqq

// Strict JSON for files that may be hostile, and text that is safe to put into a message.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace hqq {

// Objects and arrays inside each other that parse_json accepts.
inline constexpr int kMaxJsonDepth = 64;

// Parses one JSON document. Throws FormatError ("[<where>] ...") with the byte position for
// anything that is not JSON, and for a duplicate key or more than kMaxJsonDepth levels.
nlohmann::json parse_json(const std::string& text, const std::string& where);

// The same for text that Python's json module wrote (config.json, an index), which is only looked
// up here and otherwise carried over as text (json_edit.hpp): NaN, Infinity, -Infinity and numbers
// beyond a double are let pass and read as null; integers beyond 64 bits read as doubles. Keys stay
// in order.
nlohmann::ordered_json parse_python_json(const std::string& text, const std::string& where);

// The reason inside a message of nlohmann/json, without the input that it quotes.
std::string json_error_reason(const std::string& what);

// Position after the string that begins at `at` (a quote); the end of the text if it has none.
std::size_t json_string_end(std::string_view text, std::size_t at);

// `text` in double quotes, cut to a sane length, control characters and broken UTF-8 escaped: names
// come from files that nobody has checked yet.
std::string quote_text(std::string_view text);

}  // namespace hqq

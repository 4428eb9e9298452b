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

// The reason inside a message of nlohmann/json, without the input that it quotes.
std::string json_error_reason(const std::string& what);

// `text` in double quotes, cut to a sane length, control characters and broken UTF-8 escaped: names
// come from files that nobody has checked yet.
std::string quote_text(std::string_view text);

}  // namespace hqq

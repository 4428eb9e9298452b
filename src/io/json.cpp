#include "src/io/json.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <unordered_set>
#include <vector>

#include "hqq/error.hpp"

namespace hqq {
namespace {

constexpr std::size_t kMaxQuoted = 120;

// Bytes of the well-formed UTF-8 sequence at the start of `text`; 0 if there is none.
std::size_t utf8_length(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<std::uint8_t>(text[i]); };
  const std::uint8_t lead = byte(0);
  if (lead < 0x80) return 1;
  const std::size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4 || text.size() < length) return 0;
  for (std::size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
  }
  // Overlong forms, surrogates and values above U+10FFFF show in the second byte.
  if ((lead == 0xE0 && byte(1) < 0xA0) || (lead == 0xED && byte(1) > 0x9F) ||
      (lead == 0xF0 && byte(1) < 0x90) || (lead == 0xF4 && byte(1) > 0x8F)) {
    return 0;
  }
  return length;
}

// Python's json module writes these words, which no JSON parser has to know.
std::string hint(const std::string& text, std::size_t byte) {
  const std::size_t from = std::min(byte, text.size());
  const std::size_t start = text.find_last_of(" ,:[{\n\t", from == 0 ? 0 : from - 1);
  const std::string_view token =
      std::string_view(text).substr(start == std::string::npos ? 0 : start + 1);
  for (const std::string_view word : {"NaN", "Infinity", "-Infinity"}) {
    if (token.starts_with(word)) return " (" + std::string(word) + " is not a JSON number)";
  }
  return "";
}

}  // namespace

std::string json_error_reason(const std::string& what) {
  std::string reason = what;
  if (const auto bracket = reason.find("] "); bracket != std::string::npos) {
    reason.erase(0, bracket + 2);
  }
  if (const auto column = reason.find(", column "); column != std::string::npos) {
    if (const auto colon = reason.find(": ", column); colon != std::string::npos) {
      reason.erase(0, colon + 2);
    }
  }
  std::string expected;
  if (const auto tail = reason.rfind("; expected "); tail != std::string::npos) {
    if (reason.size() - tail <= 60) expected = reason.substr(tail);
  }
  if (const auto last = reason.find("; last read: "); last != std::string::npos) {
    reason.erase(last);
    reason += expected;
  }
  return reason.substr(0, 200);
}

std::string quote_text(std::string_view text) {
  std::string out = "\"";
  while (!text.empty()) {
    if (out.size() > kMaxQuoted) {
      out += "...";
      break;
    }
    const std::size_t length = utf8_length(text);
    const auto byte = static_cast<std::uint8_t>(text[0]);
    if (length == 0 || byte < 0x20 || byte == 0x7F) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\x%02x", byte);
      out += escape;
      text.remove_prefix(1);
    } else {
      if (byte == '"' || byte == '\\') out += '\\';
      out += text.substr(0, length);
      text.remove_prefix(length);
    }
  }
  return out + "\"";
}

nlohmann::json parse_json(const std::string& text, const std::string& where) {
  using nlohmann::json;
  // The lexer takes a NUL for the end of the input, and skips a byte order mark.
  if (const auto nul = text.find('\0'); nul != std::string::npos) {
    throw_format(where, "not JSON: NUL byte at byte " + std::to_string(nul));
  }
  if (text.starts_with("\xEF\xBB\xBF")) {
    throw_format(where, "not JSON: it starts with a byte order mark, which must be removed");
  }

  std::vector<std::unordered_set<std::string>> keys;  // of the objects we are in
  const auto callback = [&](int depth, json::parse_event_t event, json& value) {
    switch (event) {
      case json::parse_event_t::object_start:
      case json::parse_event_t::array_start:
        if (depth >= kMaxJsonDepth) {
          throw_format(where, "JSON is nested deeper than " + std::to_string(kMaxJsonDepth) +
                                  " levels, the limit");
        }
        if (event == json::parse_event_t::object_start) keys.emplace_back();
        break;
      case json::parse_event_t::object_end:
        keys.pop_back();
        break;
      case json::parse_event_t::key: {
        const auto& key = value.get_ref<const std::string&>();
        if (!keys.back().insert(key).second) {
          throw_format(where, "JSON key " + quote_text(key) + " appears twice in the same object");
        }
        break;
      }
      default:
        break;
    }
    return true;
  };
  try {
    return json::parse(text, callback);
  } catch (const json::parse_error& error) {
    throw_format(where, "not JSON at byte " + std::to_string(error.byte) + ": " +
                            json_error_reason(error.what()) + hint(text, error.byte));
  } catch (const json::exception& error) {
    throw_format(where, "not JSON: " + json_error_reason(error.what()));
  }
}

}  // namespace hqq

#include "src/io/json.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <unordered_set>
#include <utility>
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

// What nlohmann/json itself lets pass: deep nesting and duplicate keys. Numbers in `unreadable`,
// counted from the start of the text, become null.
template <class Json>
class Checks {
 public:
  Checks(const std::string& where, std::set<std::size_t> unreadable)
      : where_(where), unreadable_(std::move(unreadable)) {}

  bool operator()(int depth, typename Json::parse_event_t event, Json& value) {
    using Event = typename Json::parse_event_t;
    if (event == Event::object_start || event == Event::array_start) {
      if (depth >= kMaxJsonDepth) {
        throw_format(where_, "JSON is nested deeper than " + std::to_string(kMaxJsonDepth) +
                                 " levels, the limit");
      }
      if (event == Event::object_start) keys_.emplace_back();
    } else if (event == Event::object_end) {
      keys_.pop_back();
    } else if (event == Event::key) {
      const auto& key = value.template get_ref<const std::string&>();
      if (!keys_.back().insert(key).second) {
        throw_format(where_, "JSON key " + quote_text(key) + " appears twice in the same object");
      }
    } else if (event == Event::value && value.is_number()) {
      if (unreadable_.contains(numbers_++)) value = nullptr;
    }
    return true;
  }

 private:
  const std::string& where_;
  std::set<std::size_t> unreadable_;
  std::size_t numbers_ = 0;
  std::vector<std::unordered_set<std::string>> keys_;  // of the objects we are in
};

template <class Json>
Json parse_checked(const std::string& text, const std::string& where,
                   std::set<std::size_t> unreadable) {
  // The lexer takes a NUL for the end of the input, and skips a byte order mark.
  if (const auto nul = text.find('\0'); nul != std::string::npos) {
    throw_format(where, "not JSON: NUL byte at byte " + std::to_string(nul));
  }
  if (text.starts_with("\xEF\xBB\xBF")) {
    throw_format(where, "not JSON: it starts with a byte order mark, which must be removed");
  }
  try {
    return Json::parse(text, Checks<Json>(where, std::move(unreadable)));
  } catch (const nlohmann::json::parse_error& error) {
    throw_format(where, "not JSON at byte " + std::to_string(error.byte) + ": " +
                            json_error_reason(error.what()) + hint(text, error.byte));
  } catch (const nlohmann::json::exception& error) {
    throw_format(where, "not JSON: " + json_error_reason(error.what()));
  }
}

bool is_json_number(std::string_view token) {
  std::size_t at = token.starts_with('-') ? 1 : 0;
  const auto digits = [&] {
    const std::size_t begin = at;
    while (at < token.size() && token[at] >= '0' && token[at] <= '9') ++at;
    return at - begin;
  };
  const std::size_t first = at;
  const std::size_t whole = digits();
  if (whole == 0 || (whole > 1 && token[first] == '0')) return false;
  if (at < token.size() && token[at] == '.' && (++at, digits() == 0)) return false;
  if (at < token.size() && (token[at] == 'e' || token[at] == 'E')) {
    ++at;
    if (at < token.size() && (token[at] == '+' || token[at] == '-')) ++at;
    if (digits() == 0) return false;
  }
  return at == token.size();
}

bool is_unreadable_number(std::string_view token) {
  if (token == "NaN" || token == "Infinity" || token == "-Infinity") return true;
  return is_json_number(token) && std::isinf(std::strtod(std::string(token).c_str(), nullptr));
}

// Zeros of the same length in place of the numbers that no JSON parser reads, so that errors keep
// their position.
std::string with_readable_numbers(std::string text, std::set<std::size_t>& unreadable) {
  constexpr std::string_view kNumberChars =
      "+-.0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
  std::size_t numbers = 0;
  for (std::size_t at = 0; at < text.size();) {
    if (text[at] == '"') {
      at = json_string_end(text, at);
      continue;
    }
    if (kNumberChars.find(text[at]) == std::string_view::npos) {
      ++at;
      continue;
    }
    const std::size_t end = std::min(text.find_first_not_of(kNumberChars, at), text.size());
    const std::string_view token = std::string_view(text).substr(at, end - at);
    if (is_unreadable_number(token)) {
      unreadable.insert(numbers++);
      std::fill_n(text.begin() + static_cast<std::ptrdiff_t>(at), end - at, '0');
      text[at + 1] = '.';
    } else if (token[0] == '-' || (token[0] >= '0' && token[0] <= '9')) {
      ++numbers;
    }
    at = end;
  }
  return text;
}

}  // namespace

std::size_t json_string_end(std::string_view text, std::size_t at) {
  for (++at; at < text.size(); ++at) {
    if (text[at] == '"') return at + 1;
    if (text[at] == '\\') ++at;
  }
  return text.size();
}

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
  return parse_checked<nlohmann::json>(text, where, {});
}

nlohmann::ordered_json parse_python_json(const std::string& text, const std::string& where) {
  std::set<std::size_t> unreadable;
  const std::string plain = with_readable_numbers(text, unreadable);
  return parse_checked<nlohmann::ordered_json>(plain, where, std::move(unreadable));
}

}  // namespace hqq

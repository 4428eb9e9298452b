#include "src/base/json.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <set>
#include <unordered_set>
#include <utility>
#include <vector>

#include "hqq/error.hpp"

namespace hqq {
namespace {

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

[[noreturn]] void throw_parse_error(const std::string& text, const std::string& where,
                                    std::size_t byte, const nlohmann::json::exception& error) {
  const std::string reason = json_error_reason(error.what());
  constexpr int kNumberOverflow = 406;
  if (error.id == kNumberOverflow) {
    throw_format(where, reason + " at byte " + std::to_string(byte) +
                            "; a number may not be larger than a double, 1.8e308");
  }
  throw_format(where,
               "not JSON at byte " + std::to_string(byte) + ": " + reason + hint(text, byte));
}

// Receives what nlohmann/json's parser reads. Its own receivers let deep nesting and duplicate keys
// pass, and look every key up among all before it.
class Builder {
 public:
  using Json = nlohmann::ordered_json;

  // Numbers in `unreadable`, counted from the start of the text, become null.
  Builder(const std::string& text, const std::string& where, std::set<std::size_t> unreadable)
      : text_(text), where_(where), unreadable_(std::move(unreadable)) {}

  Json take() { return std::move(root_); }

  bool null() { return add(nullptr); }
  bool boolean(bool value) { return add(value); }
  bool number_integer(std::int64_t value) { return number(value); }
  bool number_unsigned(std::uint64_t value) { return number(value); }
  bool number_float(double value, const std::string& /*digits*/) { return number(value); }
  bool string(std::string& value) { return add(std::move(value)); }
  bool binary(Json::binary_t& /*value*/) { return false; }
  bool start_object(std::size_t /*count*/) {
    open(Json::object());
    keys_.emplace_back();
    return true;
  }
  bool key(std::string& key) {
    if (!keys_.back().insert(key).second) {
      throw_format(where_, "JSON key " + quote_text(key) + " appears twice in the same object");
    }
    key_ = std::move(key);
    return true;
  }
  bool end_object() {
    keys_.pop_back();
    return end_array();
  }
  bool start_array(std::size_t /*count*/) {
    open(Json::array());
    return true;
  }
  bool end_array() {
    open_.pop_back();
    return true;
  }
  bool parse_error(std::size_t byte, const std::string& /*token*/,
                   const nlohmann::json::exception& error) {
    throw_parse_error(text_, where_, byte, error);
  }

 private:
  Json* place(Json value) {
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    if (open_.back()->is_array()) {
      auto& items = open_.back()->get_ref<Json::array_t&>();
      return &items.emplace_back(std::move(value));
    }
    auto& members = open_.back()->get_ref<Json::object_t&>();
    return &members.emplace_back(std::move(key_), std::move(value)).second;
  }

  bool add(Json value) {
    place(std::move(value));
    return true;
  }

  bool number(Json value) {
    return unreadable_.contains(numbers_++) ? null() : add(std::move(value));
  }

  void open(Json value) {
    if (open_.size() >= static_cast<std::size_t>(kMaxJsonDepth)) {
      throw_format(where_, "JSON is nested deeper than " + std::to_string(kMaxJsonDepth) +
                               " levels, the limit");
    }
    open_.push_back(place(std::move(value)));
  }

  const std::string& text_;
  const std::string& where_;
  std::set<std::size_t> unreadable_;
  std::size_t numbers_ = 0;
  Json root_;
  std::string key_;
  // The objects and arrays that we are in, and the keys of the objects.
  std::vector<Json*> open_;
  std::vector<std::unordered_set<std::string>> keys_;
};

void check_size(const std::string& text, const std::string& where, std::size_t most) {
  if (text.size() <= most) return;
  throw_format(where, "the JSON text has " + std::to_string(text.size()) +
                          " bytes, more than the " + std::to_string(most) + " allowed");
}

nlohmann::ordered_json parse_checked(const std::string& text, const std::string& where,
                                     std::set<std::size_t> unreadable) {
  check_size(text, where, kMaxJsonBytes);
  // The lexer takes a NUL for the end of the input, and skips a byte order mark.
  if (const auto nul = text.find('\0'); nul != std::string::npos) {
    throw_format(where, "not JSON: NUL byte at byte " + std::to_string(nul));
  }
  // Releases of nlohmann/json say different things of it.
  if (text.find_first_not_of(" \t\r\n") == std::string::npos) {
    throw_format(where, "not JSON at byte 1: the text is empty");
  }
  if (text.starts_with("\xEF\xBB\xBF")) {
    throw_format(where, "not JSON: it starts with a byte order mark, which must be removed");
  }
  Builder builder(text, where, std::move(unreadable));
  nlohmann::ordered_json::sax_parse(text, &builder);
  return builder.take();
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
  return cut_text(reason, 200);
}

nlohmann::ordered_json parse_json(const std::string& text, const std::string& where) {
  return parse_checked(text, where, {});
}

nlohmann::ordered_json parse_python_json(const std::string& text, const std::string& where) {
  std::set<std::size_t> unreadable;
  const std::string plain = with_readable_numbers(text, unreadable);
  return parse_checked(plain, where, std::move(unreadable));
}

nlohmann::ordered_json parse_config_json(const std::string& text, const std::string& where) {
  try {
    check_size(text, where, kMaxConfigBytes);
    return parse_json(text, where);
  } catch (const FormatError& error) {
    throw std::invalid_argument(error.what());
  }
}

}  // namespace hqq

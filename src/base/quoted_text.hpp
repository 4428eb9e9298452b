// Text that is safe to put into a message: names, keys and values that nobody has checked yet.
#pragma once

#include <string>
#include <string_view>

namespace hqq {

// `text` in double quotes, cut to a sane length, control characters and broken UTF-8 escaped.
std::string quote_text(std::string_view text);

// Text in single quotes, as messages about settings show names and values.
std::string quote_name(std::string_view text);

bool is_utf8(std::string_view text);

// The part of `text` that a message shows: at most `most` bytes and "..." after them where it is
// longer. UTF-8 characters stay whole.
std::string cut_text(std::string_view text, std::size_t most);

}  // namespace hqq

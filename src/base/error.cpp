#include "hqq/error.hpp"

#include "src/base/quoted_text.hpp"

namespace hqq {
namespace {

// Names of layers and what files hold may have megabytes.
std::string sentence(const std::string& where, const std::string& message) {
  std::string text(1, '[');
  return text.append(cut_text(where, 200)).append("] ").append(cut_text(message, 1000));
}

}  // namespace

void throw_invalid(const std::string& where, const std::string& message) {
  throw std::invalid_argument(sentence(where, message));
}

void throw_format(const std::string& where, const std::string& message) {
  throw FormatError(sentence(where, message));
}

}  // namespace hqq

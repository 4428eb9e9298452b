#include "hqq/error.hpp"

namespace hqq {

void throw_invalid(const std::string& where, const std::string& message) {
  throw std::invalid_argument("[" + where + "] " + message);
}

void throw_format(const std::string& where, const std::string& message) {
  throw FormatError("[" + where + "] " + message);
}

}  // namespace hqq

// Errors thrown by the library. User mistakes are std::invalid_argument, operating-system
// failures std::system_error; the types below cover the rest (docs/architecture.md, "Errors").
#pragma once

#include <stdexcept>
#include <string>

namespace hqq {

// A file or a set of tensors that breaks its format. Python sees hqq_cpp.FormatError (a
// ValueError).
class FormatError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// A CUDA call failed, or the library was built without CUDA.
class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Work was stopped by the caller (Ctrl-C, a progress callback that returned false).
class Interrupted : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws std::invalid_argument("[<where>] <message>"), the one form of every user error.
[[noreturn]] void throw_invalid(const std::string& where, const std::string& message);
// Throws FormatError("[<where>] <message>").
[[noreturn]] void throw_format(const std::string& where, const std::string& message);

}  // namespace hqq

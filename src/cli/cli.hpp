// The command hqq-cpp. The binary and Python's console script both call run().
#pragma once

#include <functional>
#include <ostream>
#include <string>

namespace hqq::cli {

// Exit codes (docs/cli.md).
inline constexpr int kOk = 0;
inline constexpr int kDifferences = 1;  // verify and diff found something
inline constexpr int kUserError = 2;    // wrong option, value or config
inline constexpr int kFormatError = 3;  // a file that breaks its format
inline constexpr int kSystemError = 4;  // operating system or CUDA
inline constexpr int kInternalError = 5;
inline constexpr int kInterrupted = 130;

// What only the Python package can do.
struct Hooks {
  struct Outcome {
    int code = kOk;
    std::string message;  // of an error, or why there was nothing to do
  };
  // Writes qmodel.pt into a folder in upstream's layout.
  std::function<Outcome(const std::string& folder)> write_qmodel;
};

// Results go to `out`, progress and errors to `err`. argv[0] is the name of the program. Catches
// every exception and returns an exit code. Installs handlers of SIGINT and SIGTERM while it runs.
int run(int argc, const char* const* argv, std::ostream& out, std::ostream& err,
        const Hooks& hooks = {});

}  // namespace hqq::cli

// Where work runs.
#pragma once

#include <string>

namespace hqq {

struct Device {
  enum class Kind { kCpu, kCuda };
  Kind kind = Kind::kCpu;
  int index = 0;

  static Device cpu() { return {}; }
  static Device cuda(int index = 0) { return {Kind::kCuda, index}; }
  // "cpu", "cuda", "cuda:1"; throws std::invalid_argument for anything else.
  static Device parse(const std::string& text);

  std::string str() const;
  friend bool operator==(const Device&, const Device&) = default;
};

// Threads that CPU work uses when the caller passes 0: HQQ_NUM_THREADS if it is set to a positive
// number, else the number of processors this process may run on.
int default_threads();

}  // namespace hqq

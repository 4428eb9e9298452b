#include "hqq/device.hpp"

#ifdef __linux__
#include <sched.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <thread>

#include "hqq/error.hpp"
#include "src/base/quoted_text.hpp"

namespace hqq {

Device Device::parse(const std::string& text) {
  if (text == "cpu") return cpu();
  if (text == "cuda") return cuda();
  if (text.rfind("cuda:", 0) == 0 && text.size() > 5 && text.size() <= 8 &&
      text.find_first_not_of("0123456789", 5) == std::string::npos) {
    return cuda(std::stoi(text.substr(5)));
  }
  throw_invalid("device", quote_name(text) + " is not a device; use cpu, cuda or cuda:<number>");
}

std::string Device::str() const {
  switch (kind) {
    case Kind::kCpu:
      return "cpu";
    case Kind::kCuda:
      return "cuda:" + std::to_string(index);
  }
  throw std::logic_error("a device without a name");
}

int default_threads() {
  if (const char* text = std::getenv("HQQ_NUM_THREADS")) {
    char* end = nullptr;
    const long value = std::strtol(text, &end, 10);
    if (end != text && *end == '\0' && value > 0 && value <= 4096) return static_cast<int>(value);
  }
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count == 0 ? 1 : static_cast<int>(count);
}

}  // namespace hqq

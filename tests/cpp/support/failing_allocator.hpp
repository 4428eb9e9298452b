// Replaces operator new of a test program: it counts, and fails where it is told to. Include it in
// one file of the program only.
#pragma once

#include <dlfcn.h>
#include <execinfo.h>
#include <link.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace hqq::testing {

// What fails: allocation number `first`, from 1, and with `all_after` every later one.
struct AllocationFailure {
  std::int64_t first = 0;
  bool all_after = false;
};

struct AllocatorState {
  std::atomic<std::int64_t> live{0};     // allocations that are not freed
  std::atomic<std::int64_t> counted{0};  // since counting began
  std::atomic<std::int64_t> first{0};    // 0: none fails
  std::atomic<bool> all_after{false};
  std::atomic<std::int64_t> failed{0};
  // Code that may not fail: see let_foreign_code_through().
  std::vector<std::pair<std::uintptr_t, std::uintptr_t>> exempt;
};

inline AllocatorState allocator;

// The place where the program was loaded.
inline std::uintptr_t load_address() {
  std::uintptr_t address = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* result) {
        *static_cast<std::uintptr_t*>(result) = info->dlpi_addr;
        return 1;  // the first is the program
      },
      &address);
  return address;
}

// Code of others in which a failure ends the process or leaks, whatever its caller does:
// - nlohmann/json allocates in destructors; its constructor from a list leaks what it has made;
// before
//   3.11.3 it cannot destroy what operator[] could not make;
// - directory iterators and remove_all() of libstdc++ allocate where nothing may be thrown.
// False if its functions cannot be found: no nm.
inline bool let_foreign_code_through() {
  char program[4096];
  const ssize_t length = ::readlink("/proc/self/exe", program, sizeof(program) - 1);
  if (length < 0) return false;
  const std::string command = "nm -SC '" + std::string(program, static_cast<std::size_t>(length)) +
                              "' | grep "
                              "'json_value::destroy\\|basic_json<.*>::operator\\[\\]\\|basic_json("
                              "std::initializer_list' 2>&1";
  FILE* pipe = ::popen(command.c_str(), "r");
  if (pipe == nullptr) return false;
  std::uint64_t begin = 0, size = 0;
  char line[8192];
  while (std::fgets(line, sizeof(line), pipe) != nullptr) {
    std::istringstream words(line);
    if (words >> std::hex >> begin >> size) {
      allocator.exempt.emplace_back(load_address() + begin, load_address() + begin + size);
    }
  }
  ::pclose(pipe);
  void* frames[1];
  ::backtrace(frames, 1);  // the first call loads a library
  return !allocator.exempt.empty();
}

inline bool is_exempt(void* frame) {
  const auto address = reinterpret_cast<std::uintptr_t>(frame);
  for (const auto& [begin, end] : allocator.exempt) {
    if (address >= begin && address < end) return true;
  }
  Dl_info info;
  if (::dladdr(frame, &info) == 0 || info.dli_sname == nullptr) return false;
  return std::strstr(info.dli_sname, "directory_iterator") != nullptr ||
         std::strstr(info.dli_sname, "remove_all") != nullptr;
}

inline bool is_exempt() {
  void* frames[32];
  const int count = ::backtrace(frames, 32);
  return std::any_of(frames, frames + count, [](void* frame) { return is_exempt(frame); });
}

inline bool should_fail() {
  const std::int64_t number = ++allocator.counted;
  const std::int64_t first = allocator.first;
  if (first == 0 || number < first || is_exempt()) return false;
  // Where the one that was meant may not fail, the next one does.
  if (!allocator.all_after && allocator.failed > 0) return false;
  ++allocator.failed;
  return true;
}

inline void* allocate(std::size_t size, std::size_t alignment) {
  if (should_fail()) return nullptr;
  void* memory = nullptr;
  if (::posix_memalign(&memory, std::max(alignment, sizeof(void*)), std::max(size, alignment)) !=
      0) {
    return nullptr;
  }
  ++allocator.live;
  return memory;
}

inline void* allocate_or_throw(std::size_t size, std::size_t alignment) {
  if (void* memory = allocate(size, alignment)) return memory;
  throw std::bad_alloc();
}

inline void release(void* memory) {
  if (memory != nullptr) --allocator.live;
  std::free(memory);
}

// From construction to destruction allocations fail as told.
class FailAllocations {
 public:
  explicit FailAllocations(AllocationFailure failure) {
    allocator.counted = 0;
    allocator.failed = 0;
    allocator.all_after = failure.all_after;
    allocator.first = failure.first;
  }
  ~FailAllocations() { allocator.first = 0; }
  FailAllocations(const FailAllocations&) = delete;
  FailAllocations& operator=(const FailAllocations&) = delete;
};

}  // namespace hqq::testing

// clang-format off
void* operator new(std::size_t size) { return hqq::testing::allocate_or_throw(size, 0); }
void* operator new[](std::size_t size) { return hqq::testing::allocate_or_throw(size, 0); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return hqq::testing::allocate_or_throw(size, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t size, std::align_val_t alignment) {
  return hqq::testing::allocate_or_throw(size, static_cast<std::size_t>(alignment));
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return hqq::testing::allocate(size, 0); }
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept { return hqq::testing::allocate(size, 0); }
void operator delete(void* memory) noexcept { hqq::testing::release(memory); }
void operator delete[](void* memory) noexcept { hqq::testing::release(memory); }
void operator delete(void* memory, std::size_t) noexcept { hqq::testing::release(memory); }
void operator delete[](void* memory, std::size_t) noexcept { hqq::testing::release(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { hqq::testing::release(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { hqq::testing::release(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { hqq::testing::release(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { hqq::testing::release(memory); }
// Buffer::allocate().
extern "C" void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  if (hqq::testing::should_fail()) return nullptr;
  void* memory = nullptr;
  return ::posix_memalign(&memory, alignment, size) == 0 ? memory : nullptr;
}
// clang-format on

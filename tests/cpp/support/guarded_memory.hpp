// Memory beside a page that nobody may touch: an access past the buffer ends the test. Sanitizers
// do not see what vector instructions of an emulator or of assembly read; the memory management
// does.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <memory>
#include <new>

namespace hqq::testing {

enum class Guard { kBefore, kAfter };

// `size` bytes that begin right after, or end right before, a page without permissions.
inline std::shared_ptr<std::byte> guarded_memory(std::size_t size, Guard guard) {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const std::size_t used = (size + page - 1) / page * page;
  const std::size_t total = used + page;
  void* mapped = ::mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  auto* begin = static_cast<std::byte*>(mapped);
  std::byte* forbidden = guard == Guard::kBefore ? begin : begin + used;
  std::byte* data = guard == Guard::kBefore ? begin + page : begin + used - size;
  const auto unmap = [begin, total](std::byte*) { ::munmap(begin, total); };
  std::shared_ptr<std::byte> memory(data, unmap);
  if (::mprotect(forbidden, page, PROT_NONE) != 0) throw std::bad_alloc();
  return memory;
}

}  // namespace hqq::testing

#include "tests/cuda/simt/memory.hpp"

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "tests/cuda/simt/engine.hpp"

namespace hqq::simt {
namespace {

constexpr std::size_t kAlignment = 256;  // of cudaMalloc
// 0xFF in every byte is NaN as float16, bfloat16, float32 and float64.
constexpr int kPattern = 0xFF;

struct Allocations {
  std::mutex mutex;
  std::map<std::uintptr_t, std::size_t> blocks;  // size by address
  std::size_t total = 0;
};

Allocations& allocations() {
  static Allocations all;
  return all;
}

std::uintptr_t address(const void* p) { return reinterpret_cast<std::uintptr_t>(p); }

// Tests that pass memory of their own (torch tensors) say so.
bool host_memory_is_fine() {
  static const bool fine = std::getenv("HQQ_SIMT_HOST_MEMORY") != nullptr;
  return fine;
}

std::string offset_text(std::size_t offset) {
  return "offset " + std::to_string(offset) + " of shared memory";
}

std::string thread_text(const Moment& m) { return "thread " + std::to_string(m.thread); }

}  // namespace

bool is_ordered(const Moment& before, const Moment& now) {
  if (before.thread == now.thread || before.block_phase != now.block_phase) return true;
  return before.thread / kWarpSize == now.thread / kWarpSize && before.warp_phase != now.warp_phase;
}

SharedMemory::SharedMemory() : storage_(kMaxBytes + kAlignment), bytes_(kMaxBytes) {
  data_ = storage_.data() + (kAlignment - address(storage_.data()) % kAlignment) % kAlignment;
}

void SharedMemory::reset(std::size_t bytes) {
  size_ = bytes;
  std::fill(bytes_.begin(), bytes_.begin() + static_cast<std::ptrdiff_t>(bytes), Byte{});
}

std::string SharedMemory::check_range(const void* p, std::size_t size) const {
  const std::uintptr_t begin = address(data_);
  if (address(p) < begin || address(p) + size > begin + size_) {
    const auto offset = static_cast<std::int64_t>(address(p) - begin);
    return "access of " + std::to_string(size) + " bytes at offset " + std::to_string(offset) +
           " of the " + std::to_string(size_) + " bytes of shared memory";
  }
  if (address(p) % size != 0) {
    return "access of " + std::to_string(size) + " bytes at offset " +
           std::to_string(address(p) - begin) + " of shared memory is not aligned";
  }
  return "";
}

std::string SharedMemory::read(const void* p, std::size_t size, const Moment& now) {
  if (std::string problem = check_range(p, size); !problem.empty()) return problem;
  const std::size_t offset = address(p) - address(data_);
  for (std::size_t i = offset; i < offset + size; ++i) {
    Byte& byte = bytes_[i];
    if (byte.in_flight) {
      return offset_text(i) + " is read while an asynchronous copy to it is under way";
    }
    if (!byte.written) {
      return offset_text(i) + " is read before anything was written";
    }
    if (!is_ordered(byte.writer, now)) {
      return "race: " + offset_text(i) + " was written by " + thread_text(byte.writer) +
             " and is read without a barrier between";
    }
    const bool fresh = !byte.is_read || byte.reader.block_phase != now.block_phase;
    const bool other_warp = byte.reader.thread / kWarpSize != now.thread / kWarpSize;
    byte.many_readers = !fresh && (byte.many_readers || other_warp);
    byte.is_read = true;
    byte.reader = now;
  }
  return "";
}

std::string SharedMemory::write(const void* p, std::size_t size, const Moment& now) {
  if (std::string problem = check_range(p, size); !problem.empty()) return problem;
  const std::size_t offset = address(p) - address(data_);
  for (std::size_t i = offset; i < offset + size; ++i) {
    Byte& byte = bytes_[i];
    if (byte.in_flight) {
      return offset_text(i) + " is written while an asynchronous copy to it is under way";
    }
    if (byte.written && !is_ordered(byte.writer, now)) {
      return "race: " + offset_text(i) + " was written by " + thread_text(byte.writer) +
             " and is written again without a barrier between";
    }
    const bool same_phase = byte.is_read && byte.reader.block_phase == now.block_phase;
    if (same_phase && (byte.many_readers || !is_ordered(byte.reader, now))) {
      return "race: " + offset_text(i) + " was read by " + thread_text(byte.reader) +
             " and is written without a barrier between";
    }
    byte.written = true;
    byte.is_read = false;
    byte.many_readers = false;
    byte.writer = now;
  }
  return "";
}

std::string SharedMemory::begin_copy(const void* p, std::size_t size, const Moment& now) {
  std::string problem = write(p, size, now);
  if (!problem.empty()) return problem;
  const std::size_t offset = address(p) - address(data_);
  for (std::size_t i = offset; i < offset + size; ++i) bytes_[i].in_flight = true;
  return "";
}

std::string SharedMemory::end_copy(const void* p, std::size_t size, const Moment& now) {
  const std::size_t offset = address(p) - address(data_);
  for (std::size_t i = offset; i < offset + size; ++i) bytes_[i].in_flight = false;
  return write(p, size, now);
}

// ---- Global memory.

void* allocate_global(std::size_t bytes) {
  const std::size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  void* p = std::aligned_alloc(kAlignment, rounded == 0 ? kAlignment : rounded);
  if (p == nullptr) return nullptr;
  std::memset(p, kPattern, rounded);
  Allocations& all = allocations();
  const std::lock_guard lock(all.mutex);
  all.blocks[address(p)] = bytes;
  all.total += bytes;
  return p;
}

bool release_global(void* p) {
  Allocations& all = allocations();
  {
    const std::lock_guard lock(all.mutex);
    const auto found = all.blocks.find(address(p));
    if (found == all.blocks.end()) return false;
    all.total -= found->second;
    all.blocks.erase(found);
  }
  std::free(p);
  return true;
}

std::size_t allocated_bytes() {
  Allocations& all = allocations();
  const std::lock_guard lock(all.mutex);
  return all.total;
}

void check_global(const void* p, std::size_t size, std::size_t alignment) {
  if (address(p) % alignment != 0) {
    fail("access of " + std::to_string(size) + " bytes of global memory is not aligned to " +
         std::to_string(alignment));
  }
  if (host_memory_is_fine()) return;
  // Accesses come in runs over one allocation.
  thread_local std::uintptr_t begin = 0, end = 0;
  Allocations& all = allocations();
  const std::lock_guard lock(all.mutex);
  const auto inside = [&] { return address(p) >= begin && address(p) + size <= end; };
  const auto known = all.blocks.find(begin);
  if (known != all.blocks.end() && begin + known->second == end && inside()) return;
  auto after = all.blocks.upper_bound(address(p));
  if (after == all.blocks.begin()) fail("access outside every allocation of global memory");
  const auto& [start, bytes] = *std::prev(after);
  begin = start;
  end = start + bytes;
  if (!inside()) {
    fail("access of " + std::to_string(size) + " bytes at offset " +
         std::to_string(address(p) - start) + " of an allocation of " + std::to_string(bytes) +
         " bytes of global memory");
  }
}

}  // namespace hqq::simt

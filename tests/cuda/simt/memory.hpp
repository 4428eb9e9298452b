// What is known of every byte of shared memory, and of the allocations of global memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace hqq::simt {

// When a thread did something: barriers of the block and of its warp it has passed.
struct Moment {
  std::uint16_t thread = 0;
  std::uint32_t block_phase = 0;
  std::uint32_t warp_phase = 0;
};

class SharedMemory {
 public:
  static constexpr std::size_t kMaxBytes = 227 * 1024;  // a block's limit on sm_90

  SharedMemory();
  // For a block that has `bytes` of it: nothing is written yet.
  void reset(std::size_t bytes);
  unsigned char* data() { return data_; }

  // The empty string, or what is wrong.
  std::string read(const void* p, std::size_t size, const Moment& now);
  std::string write(const void* p, std::size_t size, const Moment& now);
  // An asynchronous copy may write at any time between the two.
  std::string begin_copy(const void* p, std::size_t size, const Moment& now);
  std::string end_copy(const void* p, std::size_t size, const Moment& now);

 private:
  struct Byte {
    bool written = false;
    bool in_flight = false;
    bool is_read = false;
    bool many_readers = false;  // of this phase, and not all in one warp
    Moment writer, reader;
  };

  std::string check_range(const void* p, std::size_t size) const;

  std::vector<unsigned char> storage_;
  unsigned char* data_ = nullptr;  // in it, as aligned as a GPU's
  std::vector<Byte> bytes_;
  std::size_t size_ = 0;
};

// Whether a barrier lies between `before` and `now`, or both are one thread.
bool is_ordered(const Moment& before, const Moment& now);

}  // namespace hqq::simt

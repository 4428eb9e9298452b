// Owners of what the CUDA library gives: memory, streams, the current device.
#pragma once

#include <cstddef>
#include <string>
#include <utility>

#include "hqq/error.hpp"
#include "src/cuda/library.hpp"

namespace hqq::cuda {

// Throws CudaError "[cuda] <what>: <text of the library>" unless status is kOk.
inline void check(Status status, const std::string& what) {
  if (status == Status::kOk) return;
  throw CudaError("[cuda] " + what + ": " + library().error_text());
}

// Makes a device current in this thread, and again the one that was.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) : device_(device) {
    require_device(device);
    check(library().set_device(device, &previous_), "cuda:" + std::to_string(device));
  }
  ~CurrentDevice() {
    int ignored = 0;
    if (previous_ != device_) library().set_device(previous_, &ignored);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int device_;
  int previous_ = 0;
};

// Bytes that grow on demand, of the current device or pinned on the host; contents are lost.
template <auto Allocate, auto Release>
class GrowingMemory {
 public:
  GrowingMemory() = default;
  GrowingMemory(GrowingMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  GrowingMemory& operator=(GrowingMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~GrowingMemory() { clear(); }

  // Memory of at least `size` bytes. Nothing may be using the memory.
  std::byte* reserve(std::size_t size, const std::string& what) {
    if (size > size_) {
      clear();
      void* memory = nullptr;
      const Status status = (library().*Allocate)(size, &memory);
      if (status != Status::kOk) {
        throw CudaError("[cuda] " + what + " needs " + std::to_string(size) +
                        " bytes: " + library().error_text());
      }
      data_ = static_cast<std::byte*>(memory);
      size_ = size;
    }
    return data_;
  }
  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  // A failure to release has nowhere to go, and the next call reports what is wrong.
  void clear() {
    if (data_ != nullptr) (library().*Release)(data_);
    data_ = nullptr;
    size_ = 0;
  }

  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};
// Where kernels want the beginning of what they read.
constexpr std::size_t aligned(std::size_t size) {
  constexpr std::size_t kAlignment = 256;
  return (size + kAlignment - 1) / kAlignment * kAlignment;
}

// Places in a block of memory, one after the other and aligned. `size` is that of the block.
struct Places {
  std::size_t size = 0;
  std::size_t add(std::size_t bytes) { return std::exchange(size, size + aligned(bytes)); }
};

using DeviceMemory = GrowingMemory<&Api::allocate, &Api::release>;
using PinnedMemory = GrowingMemory<&Api::allocate_pinned, &Api::release_pinned>;

// A stream of the device that is current when it is made.
class Stream {
 public:
  Stream() { check(library().create_stream(&handle_), "a stream"); }
  ~Stream() { library().destroy_stream(handle_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  StreamHandle get() const { return handle_; }
  void synchronize(const std::string& what) const { check(library().synchronize(handle_), what); }

 private:
  StreamHandle handle_ = nullptr;
};

}  // namespace hqq::cuda

// Memory that a thread uses again and again.
#pragma once

#include <cstddef>

#include "hqq/tensor.hpp"

namespace hqq::cpu {

// An aligned array that only grows. get() keeps no contents.
template <class T>
class Scratch {
 public:
  T* get(std::int64_t count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    if (bytes > buffer_.size) buffer_ = Buffer::allocate(bytes);
    return reinterpret_cast<T*>(buffer_.data);
  }

 private:
  Buffer buffer_;
};

}  // namespace hqq::cpu

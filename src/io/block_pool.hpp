// Large buffers straight from the system. The heap keeps freed megabytes in an arena of each
// thread, which would break the bound on memory; here they go back at once, but for one that the
// next step takes over.
#pragma once

#include <memory>

#include "hqq/tensor.hpp"

namespace hqq {

class BlockPool {
 public:
  // `largest`: the largest size that will be asked for.
  explicit BlockPool(std::size_t largest = 0);

  // What a buffer of this size counts for: large blocks are all alike, so that each can follow any
  // other, and of small ones only what is used takes memory.
  std::size_t taken(std::size_t size) const;
  // Not initialized, aligned to pages. Takes over the spare block if that is large enough and frees
  // it otherwise, so what the pool holds never exceeds what its users have held at one time. Thread
  // safe, also the release of a buffer, which may outlive the pool.
  Buffer take(std::size_t size);
  // Tensor::allocate with such a buffer.
  Tensor allocate(DType dtype, std::vector<std::int64_t> shape);

  static constexpr std::size_t kSmall = std::size_t{4} << 20;
  static constexpr std::size_t kSmallSpares = 4;

 private:
  struct State;

  std::size_t block_size(std::size_t size) const;

  std::size_t largest_;
  std::shared_ptr<State> state_;
};

}  // namespace hqq

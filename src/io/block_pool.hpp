// Large buffers straight from the system. The heap keeps freed megabytes in an arena of each
// thread, which would break the bound on memory; here they go back at once, but for one that the
// next step takes over.
#pragma once

#include <memory>

#include "hqq/tensor.hpp"

namespace hqq {

class BlockPool {
 public:
  BlockPool();

  // Not initialized, aligned to pages. Takes over the spare block if that is large enough and frees
  // it otherwise, so what the pool holds never exceeds what its users have held at one time. Thread
  // safe, also the release of a buffer, which may outlive the pool.
  Buffer take(std::size_t size);
  // Tensor::allocate with such a buffer.
  Tensor allocate(DType dtype, std::vector<std::int64_t> shape);

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace hqq

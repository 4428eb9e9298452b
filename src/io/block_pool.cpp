#include "src/io/block_pool.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace hqq {

struct BlockPool::State {
  struct Block {
    void* data = nullptr;
    std::size_t size = 0;
  };

  static void free_block(Block block) {
    if (block.data != nullptr) ::munmap(block.data, block.size);
  }
  static Block new_block(std::size_t size) {
    void* data = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    return {data, size};
  }

  std::mutex mutex;
  Block large;
  std::vector<Block> small;

  ~State() {
    free_block(large);
    for (const Block& block : small) free_block(block);
  }

  Block take_small() {
    const std::lock_guard lock(mutex);
    if (small.empty()) return {};
    const Block block = small.back();
    small.pop_back();
    return block;
  }
  Block take_large() {
    const std::lock_guard lock(mutex);
    return std::exchange(large, {});
  }
  void give_back(Block block) {
    {
      const std::lock_guard lock(mutex);
      if (block.size <= kSmall) {
        if (small.size() < kSmallSpares) {
          small.push_back(block);
          return;
        }
      } else if (block.size > large.size) {
        std::swap(block, large);
      }
    }
    free_block(block);
  }
};

BlockPool::BlockPool(std::size_t largest) : largest_(largest), state_(std::make_shared<State>()) {
  // give_back must not fail.
  state_->small.reserve(kSmallSpares);
}

std::size_t BlockPool::block_size(std::size_t size) const {
  return size <= kSmall ? kSmall : std::max(size, largest_);
}

std::size_t BlockPool::taken(std::size_t size) const {
  return size <= kSmall ? size : block_size(size);
}

Buffer BlockPool::take(std::size_t size) {
  State::Block block = size <= kSmall ? state_->take_small() : state_->take_large();
  if (block.size < size || block.data == nullptr) {
    State::free_block(block);
    block = State::new_block(block_size(size));
  }
  std::shared_ptr<void> owner(block.data,
                              [state = state_, block](void*) { state->give_back(block); });
  return {std::move(owner), static_cast<std::byte*>(block.data), size};
}

Tensor BlockPool::allocate(DType dtype, std::vector<std::int64_t> shape) {
  const auto numel = static_cast<std::size_t>(checked_numel(shape, "tensor"));
  return {dtype, std::move(shape), take(numel * dtype_size(dtype))};
}

}  // namespace hqq

#include "src/io/block_pool.hpp"

#include <sys/mman.h>

#include <mutex>
#include <new>
#include <utility>

namespace hqq {
namespace {

struct Block {
  void* data = nullptr;
  std::size_t size = 0;
};

void free_block(Block block) {
  if (block.data != nullptr) ::munmap(block.data, block.size);
}

Block new_block(std::size_t size) {
  void* data = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  return {data, size};
}

}  // namespace

struct BlockPool::State {
  std::mutex mutex;
  Block spare;

  ~State() { free_block(spare); }

  Block exchange_spare(Block block) {
    const std::lock_guard lock(mutex);
    return std::exchange(spare, block);
  }
  // Keeps the larger of the two.
  void give_back(Block block) {
    {
      const std::lock_guard lock(mutex);
      if (block.size > spare.size) std::swap(block, spare);
    }
    free_block(block);
  }
};

BlockPool::BlockPool() : state_(std::make_shared<State>()) {}

Buffer BlockPool::take(std::size_t size) {
  Block block = state_->exchange_spare({});
  if (block.size < size || size == 0) {
    free_block(block);
    block = new_block(size == 0 ? 1 : size);
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

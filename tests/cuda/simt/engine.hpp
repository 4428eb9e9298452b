// A CPU that behaves like one GPU, strictly: it runs kernels block by block, the threads of a block
// as fibers, and stops a kernel at the first thing that a GPU need not forgive (README.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

namespace hqq::simt {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xFFFFFFFFu;

// What kernels read as threadIdx, blockIdx, blockDim, gridDim.
struct ThreadView {
  Dim3 thread, block, block_size, grid_size;
};
const ThreadView& this_thread();

// ---- Launching.

struct Launch {
  Dim3 grid, block;
  std::size_t shared_bytes = 0;
};
// Runs `body` once a thread. Returns the empty string, or the first error: what, where, which
// thread.
std::string run(const Launch& launch, const std::function<void()>& body);

// ---- For device.hpp: each call checks, and on an error leaves the kernel by an exception.

// Where threads wait for each other.
using Location = std::source_location;
void block_barrier(const Location& at);
void warp_barrier(unsigned mask, const Location& at);

unsigned char* shared_arena();

enum class Access { kRead, kWrite };
// Shared memory: inside the arena, aligned to `size`, written before it is read, and no other
// thread has touched it since the last barrier that orders the two.
void check_shared(const void* p, std::size_t size, Access access);
// Global memory: inside one allocation, aligned to `size`.
void check_global(const void* p, std::size_t size, std::size_t alignment);

// cp.async: the copy happens when it is waited for, so that a missing wait shows.
void copy_async(void* shared, const void* global, bool copy);
void copy_async_commit();
void copy_async_wait(int pending);

// A step of all lanes of `mask` together. Each gives the address of its operands; the lane that
// arrives last runs `step` on all of them (null for lanes outside the mask); then all go on.
using WarpStep = void (*)(void* const (&lanes)[kWarpSize]);
void warp_step(unsigned mask, const char* name, void* operands, WarpStep step, const Location& at);

[[noreturn]] void fail(const std::string& what);

// ---- Device memory, for cuda_runtime.h.

void* allocate_global(std::size_t bytes);  // filled with a pattern that is NaN in every float type
bool release_global(void* p);              // false: it is not one
// Bytes in use, for tests of leaks.
std::size_t allocated_bytes();

}  // namespace hqq::simt

// Which linear kernel multiplies, and how its work is cut. Decided here and nowhere else.
#pragma once

#include <cstdint>

#include "cuda/runtime.hpp"

namespace hqq::cuda {

enum class LinearKernel {
  kDecode8,   // up to 8 tokens (rows of x) at a time
  kDecode16,  // up to 16; axis 1 only
  kGemm,      // 64
};

struct LinearPlan {
  LinearKernel kernel = LinearKernel::kDecode8;
  int strips_per_block = 8;  // strips of 32 rows; decode: 1, 2, 4 or 8, kGemm: 4
  int splits = 1;            // blocks that share the columns of a strip
  int tiles_per_split = 0;   // tiles of 64 columns, whole units
  int token_blocks = 1;      // blocks side by side that take tiles of tokens in turn
};

int tokens_of(LinearKernel kernel);

// Tiles of a stage of the kernel's ring.
int stage_tiles(const DeviceMatrix& weight, const LinearPlan& plan);

// Axis 1: steps of 16 columns in a group, and groups in a ring that has all of a stage of `tiles`.
std::int64_t group_steps(const core::GroupLayout& layout);
std::int64_t ring_groups(const core::GroupLayout& layout, int tiles);

// Axis 1: whether scale and zero are held in float32; else both are stored in float16.
bool has_float_metadata(const DeviceMatrix& q);

// Shared memory of a block.
struct SharedBytes {
  std::size_t x;      // or sums, in the same place
  std::size_t warp;   // rings of codes and scales of one warp
  std::size_t warps;  // of all, or what the sums need
  std::size_t all() const;
};
SharedBytes shared_bytes(const LinearArgs& args, const LinearPlan& plan);

// Whether all blocks of a plan find a counter; only those with splits > 1 need one.
bool counters_suffice(const LinearArgs& args, const LinearPlan& plan);

LinearPlan choose_linear(const LinearArgs& args, const DeviceTraits& device);

// Tokens up to which choose_linear()'s kernels beat dequantizing and a dense product.
std::int64_t max_rows(const core::GroupLayout& layout, const DeviceTraits& device);

// A plan with this kernel and cut, for tests; tiles_per_split follows.
LinearPlan make_plan(const LinearArgs& args, LinearKernel kernel, int strips_per_block, int splits);

}  // namespace hqq::cuda

// Which fused kernel multiplies, and how its work is cut. Decided here and nowhere else.
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

// Axis 1: steps of 16 columns in a group, and groups that may reach into `tiles` tiles.
std::int64_t group_steps(const core::GroupLayout& layout);
std::int64_t slot_groups(const core::GroupLayout& layout, int tiles);

// Bytes of metadata with a unit of tiles, in shared memory.
int slot_bytes(const FusedMatrix& weight, int tiles);

// Shared memory of a block.
struct SharedBytes {
  std::size_t x;  // or sums, in the same place
  std::size_t rings;
  std::size_t all() const;
};
SharedBytes shared_bytes(const FusedLinearArgs& args, const LinearPlan& plan);

// Whether the device has room for every weight's last resort, kGemm.
bool gemm_fits(const FusedMatrix& weight, const DeviceTraits& device);

// Whether all blocks of a plan find a counter; only those with splits > 1 need one.
bool counters_suffice(const FusedLinearArgs& args, const LinearPlan& plan);

LinearPlan choose_linear(const FusedLinearArgs& args, const DeviceTraits& device);

// Tokens up to which choose_linear()'s kernels beat dequantizing and a dense product.
std::int64_t fused_max_rows(const FusedMatrix& weight, const DeviceTraits& device);

// A plan with this kernel and cut, for tests; tiles_per_split follows.
LinearPlan make_plan(const FusedLinearArgs& args, LinearKernel kernel, int strips_per_block,
                     int splits);

}  // namespace hqq::cuda

// Weights and importance as the quantizing kernels read them.
#pragma once

#include <cstdint>

#include "cuda/api.hpp"
#include "cuda/device/format/metadata.hpp"
#include "cuda/device/simt/simt.hpp"
#include "hqq/core/group.hpp"

namespace hqq::cuda::device {

struct WeightSource {
  const void* W = nullptr;
  DType type = DType::kF32;
  std::int64_t cols = 0;
  std::int64_t row_stride = 0;
  // 1 / col_scale, [cols]; null: not balanced.
  const float* inv_col_scale = nullptr;
};

__device__ inline float raw_weight(const WeightSource& source, std::int64_t row, std::int64_t col) {
  return load_float(source.type, source.W, row * source.row_stride + col);
}

// The weight that the solver sees.
__device__ inline float balanced(const WeightSource& source, float raw, std::int64_t col) {
  return source.inv_col_scale == nullptr ? raw : raw * ld_global(source.inv_col_scale + col);
}

using Counter = unsigned long long;  // the type that atomics take

// Without `problems` nobody asks, or another kernel checks.
__device__ inline void check_weight(QuantizeProblems* problems, float raw, std::int64_t position) {
  if (raw - raw == 0.0f || problems == nullptr) return;
  atomicAdd(reinterpret_cast<Counter*>(&problems->nonfinite), Counter{1});
  atomicMin(reinterpret_cast<Counter*>(&problems->first_nonfinite), static_cast<Counter>(position));
}

// Values 0, 1, ... of a group. Where they lie is known when compiling: a pointer that may be either
// costs twice as many instructions a load.
template <bool kShared>
struct Strided {
  const float* first = nullptr;
  std::int64_t step = 1;
  __device__ float operator()(std::int64_t i) const {
    if constexpr (kShared) {
      return simt::ld_shared(first + static_cast<int>(i) * static_cast<int>(step));
    } else {
      return ld_global(first + i * step);
    }
  }
};

// Importance of the columns that the weights of a group lie in: in shared memory beside the
// weights, else weight i lies in column (position + i * groups) % cols.
struct ColumnValues {
  const float* values = nullptr;
  std::int64_t position = 0, groups = 0, cols = 0;
  __device__ float operator()(std::int64_t i) const {
    return ld_global(values + (position + i * groups) % cols);
  }
};

struct Place {
  std::int64_t row, col;
};

// Steps through a matrix of `cols` columns, `step` elements at a time: one division for all steps.
class Walk {
 public:
  __device__ Walk(std::int64_t cols, std::int64_t first, std::int64_t step)
      : cols_(cols), step_{step / cols, step % cols}, place_{first / cols, first % cols} {}
  __device__ Place next() {
    const Place place = place_;
    place_.row += step_.row;
    place_.col += step_.col;
    if (place_.col >= cols_) {
      place_.col -= cols_;
      ++place_.row;
    }
    return place;
  }

 private:
  std::int64_t cols_;
  Place step_, place_;
};

// How the groups of a block lie in shared memory. Axis 1: group after group. Axis 0: weight 0 of
// all groups, weight 1, ... Importance has a second area of the same shape.
struct GroupTile {
  bool used = true;  // false: groups are too long, and are read from `weights`
  // Floats a group takes. Axis 1: odd, so that no two lanes share a bank.
  std::int64_t length = 0;
  // Where not used: balanced, weight 0 of all groups, weight 1, ...
  const float* weights = nullptr;
};

struct TileArgs {
  WeightSource source;
  core::GroupLayout layout;
  const float* importance = nullptr;  // [cols], or null
  GroupTile tile;
  QuantizeProblems* problems = nullptr;  // null: another kernel checks the weights
};

__device__ inline float* tile_area(const TileArgs& args, int which) {
  return reinterpret_cast<float*>(simt::shared_memory()) + which * blockDim.x * args.tile.length;
}

__device__ inline void put_weight(const TileArgs& args, float raw, Place at, std::int64_t offset,
                                  bool weighted) {
  check_weight(args.problems, raw, at.row * args.layout.cols + at.col);
  simt::st_shared(tile_area(args, 0) + offset, balanced(args.source, raw, at.col));
  if (weighted) simt::st_shared(tile_area(args, 1) + offset, ld_global(args.importance + at.col));
}

// Loads that a lane has under way at a time.
inline constexpr int kLoadsAhead = 4;

// A warp loads n weights of a row to `offset`: neighbouring lanes read neighbouring weights.
__device__ inline void load_row_group(const TileArgs& args, Place first, std::int64_t n,
                                      std::int64_t offset, bool weighted) {
  for (std::int64_t i = threadIdx.x % 32; i < n; i += 32 * kLoadsAhead) {
    float raw[kLoadsAhead];
#pragma unroll
    for (int a = 0; a < kLoadsAhead; ++a) {
      if (i + 32 * a < n) raw[a] = raw_weight(args.source, first.row, first.col + i + 32 * a);
    }
#pragma unroll
    for (int a = 0; a < kLoadsAhead; ++a) {
      const std::int64_t at = i + 32 * a;
      if (at < n) put_weight(args, raw[a], {first.row, first.col + at}, offset + at, weighted);
    }
  }
}

// All threads of the block: loads its groups, one a thread.
__device__ inline void load_tile(const TileArgs& args, bool weighted) {
  const core::GroupLayout& layout = args.layout;
  const std::int64_t groups = layout.num_groups();
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * blockDim.x;
  const std::int64_t rest = groups - first;
  if (layout.axis == 1) {
    const std::int64_t count = rest < blockDim.x ? rest : blockDim.x;
    const std::int64_t warp = threadIdx.x / 32;
    const std::int64_t warps = blockDim.x / 32;
    Walk walk(layout.groups_per_row(), first + warp, warps);
    for (std::int64_t k = warp; k < count; k += warps) {
      const Place group = walk.next();
      load_row_group(args, {group.row, group.col * layout.group_size},
                     layout.length_in_row(group.col), k * args.tile.length, weighted);
    }
    return;
  }
  if (threadIdx.x >= rest) return;
  const std::int64_t group = first + threadIdx.x;
  const std::int64_t n = layout.strided_length(group);
  Walk walk(layout.cols, group, groups);
  for (std::int64_t i = 0; i < n; i += kLoadsAhead) {
    Place at[kLoadsAhead];
    float raw[kLoadsAhead];
#pragma unroll
    for (int a = 0; a < kLoadsAhead; ++a) {
      at[a] = walk.next();
      if (i + a < n) raw[a] = raw_weight(args.source, at[a].row, at[a].col);
    }
#pragma unroll
    for (int a = 0; a < kLoadsAhead; ++a) {
      if (i + a < n) {
        put_weight(args, raw[a], at[a], (i + a) * blockDim.x + threadIdx.x, weighted);
      }
    }
  }
}

// This thread's group in an area of shared memory, after load_tile() and a barrier.
__device__ inline Strided<true> in_tile(const TileArgs& args, int area) {
  if (args.layout.axis == 0) return {tile_area(args, area) + threadIdx.x, blockDim.x};
  return {tile_area(args, area) + threadIdx.x * args.tile.length, 1};
}

// kShared: GroupTile::used.
template <bool kShared>
__device__ inline Strided<kShared> group_weights(const TileArgs& args, std::int64_t group) {
  if constexpr (kShared) {
    return in_tile(args, 0);
  } else {
    return {args.tile.weights + group, args.layout.num_groups()};
  }
}

template <bool kShared>
__device__ inline auto group_importance(const TileArgs& args, std::int64_t group) {
  if constexpr (kShared) {
    return in_tile(args, 1);
  } else {
    const core::GroupLayout& layout = args.layout;
    if (layout.axis == 0) {
      return ColumnValues{args.importance, group, layout.num_groups(), layout.cols};
    }
    const std::int64_t first = group % layout.groups_per_row() * layout.group_size;
    return ColumnValues{args.importance, first, 1, layout.cols};
  }
}

__device__ inline std::int64_t group_length(const core::GroupLayout& layout, std::int64_t group) {
  return layout.axis == 1 ? layout.length_in_row(group % layout.groups_per_row())
                          : layout.strided_length(group);
}

// Writes GroupTile::weights; a thread a weight.
static __global__ void copy_weights_kernel(WeightSource source, core::GroupLayout layout,
                                           float* out) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= layout.numel()) return;
  const std::int64_t row = i / layout.cols;
  const std::int64_t col = i % layout.cols;
  std::int64_t at = i;
  if (layout.axis == 1) {
    const std::int64_t group = row * layout.groups_per_row() + col / layout.group_size;
    at = col % layout.group_size * layout.num_groups() + group;
  }
  st_global(out + at, balanced(source, raw_weight(source, row, col), col));
}

}  // namespace hqq::cuda::device

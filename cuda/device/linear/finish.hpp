// From the sums of warps to y: over the warps of a block, and over the blocks that share columns.
#pragma once

#include <cstdint>

#include "cuda/device/format/tile.hpp"
#include "cuda/device/linear/launch_shape.hpp"
#include "cuda/device/linear/params.hpp"
#include "cuda/device/simt/simt.hpp"

namespace hqq::cuda::device {

// Sums [part][token][row] in shared memory, written by all warps of the block; tokens are
// sums_stride() apart.
struct BlockSums {
  int parts, block_tokens;
  int first_row;  // in the order of tiles
  std::int64_t first_token;
  int tokens;
};

__device__ __forceinline__ void add(float4& sum, const float4& v) {
  sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
}

// Four rows of y from `row` on, a multiple of four.
template <class T>
__device__ inline void write_y(const LinearParams& p, int expert, int row, std::int64_t token,
                               const float4& sum) {
  if (row >= p.N) return;
  // See RowOrder. Groups are a multiple of four rows.
  const bool in_order = p.group_size == 0;
  const int n = in_order ? row : row % p.group_size * p.scale_rows + row / p.group_size;
  const int step = in_order ? 1 : p.scale_rows;
  std::uint16_t* y = p.y + token * p.y_stride + n;
  const std::uint16_t* bias =
      p.bias == nullptr ? nullptr : p.bias + static_cast<std::int64_t>(expert) * p.N + n;
  const bool together =
      in_order && row + 4 <= p.N &&
      (reinterpret_cast<std::uintptr_t>(y) | reinterpret_cast<std::uintptr_t>(bias)) % 8 == 0;
  if (together) {
    float4 v = sum;
    if (bias != nullptr) {
      const uint2 bits = ld_global(reinterpret_cast<const uint2*>(bias));
      const auto value = [](std::uint32_t half) {
        return T::to_float(static_cast<std::uint16_t>(half));
      };
      add(v, make_float4(value(bits.x), value(bits.x >> 16), value(bits.y), value(bits.y >> 16)));
    }
    st_global(reinterpret_cast<uint2*>(y),
              make_uint2(simt::pack2<T>(v.x, v.y), simt::pack2<T>(v.z, v.w)));
    return;
  }
  const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (row + i >= p.N) return;
    float value = values[i];
    if (bias != nullptr) value += T::to_float(ld_global(bias + i * step));
    st_global(y + i * step, T::from_float(value));
  }
}

// Counts the blocks that have written their partial sums; whether this one is the last. Barriers
// and the fences of one thread order what all threads wrote before and read afterwards.
__device__ inline bool is_last_block(const LinearParams& p, unsigned* counter) {
  auto* last = reinterpret_cast<unsigned*>(simt::shared_memory());
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const bool all = atomicAdd(counter, 1u) + 1 == static_cast<unsigned>(p.splits);
    __threadfence();
    if (all) st_global(counter, 0u);  // for the next launch
    st_shared(last, all ? 1u : 0u);
  }
  __syncthreads();
  return ld_shared(last) != 0;
}

// Where the sums of four rows, which a thread adds up at a time, are in a block and in y.
struct QuadPlaces {
  __device__ QuadPlaces(const LinearParams& p, const BlockSums& s)
      : shift(p.row_shift - 2),
        padded_rows(p.strips * kTileRows),
        count(s.tokens << shift),
        first_row(s.first_row),
        split_floats(p.rows * padded_rows),
        partials(p.partials + s.first_token * padded_rows + first_row) {}

  __device__ int token(int quad) const { return quad >> shift; }
  __device__ int row(int quad) const { return 4 * (quad & ((1 << shift) - 1)); }
  __device__ bool is_inside(int quad) const {
    return quad < count && first_row + row(quad) < padded_rows;
  }
  // The place of split 0; the next split is split_floats further.
  __device__ float* partial(int quad) const {
    return partials + static_cast<std::int64_t>(token(quad)) * padded_rows + row(quad);
  }

  int shift, padded_rows, count, first_row;
  std::int64_t split_floats;
  float* partials;
};

// Adds up the sums of all splits, in a fixed order. Writes y.
template <class T>
__device__ void add_splits(const LinearParams& p, const BlockSums& s, const QuadPlaces& places,
                           int expert) {
  const auto threads = static_cast<int>(blockDim.x);
  for (int quad = static_cast<int>(threadIdx.x); quad < places.count;
       quad += kLastQuads * threads) {
    float4 sum[kLastQuads];
    const float* partial[kLastQuads];
    bool inside[kLastQuads];
#pragma unroll
    for (int j = 0; j < kLastQuads; ++j) {
      const int mine = quad + j * threads;
      inside[j] = places.is_inside(mine);
      partial[j] = places.partial(mine);
      sum[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    for (int first = 0; first < p.splits; first += kLastSplits) {
      // All loads are under way before the first is waited for.
      float4 v[kLastQuads][kLastSplits];
#pragma unroll
      for (int i = 0; i < kLastSplits; ++i) {
#pragma unroll
        for (int j = 0; j < kLastQuads; ++j) {
          v[j][i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          if (inside[j] && first + i < p.splits) {
            v[j][i] = simt::ld_coherent(reinterpret_cast<const float4*>(partial[j]));
          }
          partial[j] += places.split_floats;
        }
      }
#pragma unroll
      for (int i = 0; i < kLastSplits; ++i) {
#pragma unroll
        for (int j = 0; j < kLastQuads; ++j) add(sum[j], v[j][i]);
      }
    }
#pragma unroll
    for (int j = 0; j < kLastQuads; ++j) {
      const int mine = quad + j * threads;
      if (!inside[j]) continue;
      write_y<T>(p, expert, s.first_row + places.row(mine), s.first_token + places.token(mine),
                 sum[j]);
    }
  }
}

// Adds up the sums of all parts and, with splits, of all blocks, in a fixed order. Writes y.
template <class T>
__device__ void finish(const LinearParams& p, const float* sums, const BlockSums& s, int expert,
                       int split) {
  const QuadPlaces places(p, s);
  const int token_floats = sums_stride(1 << p.row_shift);
  const auto threads = static_cast<int>(blockDim.x);

  __syncthreads();
  for (int quad = static_cast<int>(threadIdx.x); quad < places.count; quad += threads) {
    if (!places.is_inside(quad)) continue;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const float* part = sums + places.token(quad) * token_floats + places.row(quad);
#pragma unroll 2
    for (int i = 0; i < s.parts; ++i) {
      add(sum, ld_shared(reinterpret_cast<const float4*>(part)));
      part += s.block_tokens * token_floats;
    }
    if (p.splits == 1) {
      write_y<T>(p, expert, s.first_row + places.row(quad), s.first_token + places.token(quad),
                 sum);
    } else {
      float* partial = places.partial(quad) + split * places.split_floats;
      st_global(reinterpret_cast<float4*>(partial), sum);
    }
  }
  if (p.splits == 1) return;

  // The block that comes last adds up.
  const int row_blocks = (p.strips + p.strips_per_block - 1) / p.strips_per_block;
  if (is_last_block(p, p.counters + s.first_token * row_blocks + (s.first_row >> p.row_shift))) {
    add_splits<T>(p, s, places, expert);
  }
}

}  // namespace hqq::cuda::device

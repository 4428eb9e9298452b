// What the fused kernels share: their arguments, the stream of weights of a warp, the last sums.
#pragma once

#include <cstdint>

#include "cuda/api.hpp"
#include "cuda/device/fragments.hpp"
#include "cuda/device/launch_shape.hpp"
#include "cuda/device/simt.hpp"
#include "cuda/device/tile.hpp"

namespace hqq::cuda::device {

using simt::ld_global;
using simt::ld_shared;
using simt::st_global;
using simt::st_shared;

// How a kernel applies scale and zero.
enum class Scaling {
  kSums,     // axis 1: to sums over (parts of) groups, in float32
  kRows,     // axis 1: to weights, in 16 bits
  kColumns,  // axis 0: to weights, in 16 bits
};

// n / divisor for n and divisor up to 2^15: the error of factor is below divisor / 2^31.
struct Divider {
  static constexpr int kShift = 31;
  std::uint32_t divisor = 1;
  std::uint32_t factor = 1u << kShift;  // ceil(2^31 / divisor)
  HQQ_HD int operator()(int n) const {
    const std::uint64_t product =
        static_cast<std::uint64_t>(static_cast<std::uint32_t>(n)) * factor;
    return static_cast<int>(product >> kShift);
  }
};

struct LinearParams {
  const unsigned char* codes = nullptr;
  const unsigned char* metadata = nullptr;
  const float* col_scale = nullptr;  // or null
  // Bytes between experts.
  std::int64_t codes_stride = 0, metadata_stride = 0, col_scale_stride = 0;
  int N = 0, K = 0;
  int strips = 0, tiles = 0;  // tiles of a strip
  // Axis 1.
  Divider group_steps;          // group_size in steps of 16 columns
  bool float_metadata = false;  // else float16
  // Axis 0.
  int group_size = 0;  // and for axis 1: 0
  int scale_rows = 0;

  const std::int64_t* row_begin = nullptr;  // or null: all rows
  const std::uint16_t* x = nullptr;
  std::int64_t rows = 0, x_stride = 0;
  bool x_aligned = false;  // rows begin at multiples of 16 bytes
  const std::uint16_t* bias = nullptr;
  std::uint16_t* y = nullptr;
  std::int64_t y_stride = 0;

  int strips_per_block = 0;  // a power of two
  int row_shift = 0;         // 2^row_shift = 32 strips_per_block
  int splits = 1, tiles_per_split = 0;
  int slot_bytes = 0;            // of metadata in a stage
  int ring_offset = 0;           // in shared memory
  float* partials = nullptr;     // [splits, rows, 32 strips], with splits > 1
  unsigned* counters = nullptr;  // zeros
};

struct Tokens {
  std::int64_t begin, end;
};
__device__ inline Tokens tokens_of(const LinearParams& p, int expert) {
  if (p.row_begin == nullptr) return {0, p.rows};
  // Counts come from the model: never past the rows there are.
  const std::int64_t begin = ld_global(p.row_begin + expert);
  const std::int64_t end = ld_global(p.row_begin + expert + 1);
  return {begin < 0 ? 0 : begin, end < p.rows ? end : p.rows};
}

// The tiles [begin, end) of a strip, with their metadata, through a ring in shared memory that
// belongs to one warp. A stage is kStageTiles tiles, a unit or one; `begin` is a multiple of it.
template <int kBits, Scaling kScaling, int kStageTiles, int kDepth>
class WeightStream {
 public:
  static constexpr int kCodesBytes = kStageTiles * tile_bytes(kBits);

  __device__ WeightStream(const LinearParams& p, int expert, int strip, int begin, int end,
                          unsigned char* ring)
      : p_(p),
        lane_(static_cast<int>(threadIdx.x % 32)),
        tile_(begin),
        requested_(begin),
        end_(end),
        stage_bytes_(kCodesBytes + p.slot_bytes),
        ring_(ring),
        read_(0),
        write_(0) {
    codes_ = p.codes + expert * p.codes_stride +
             (static_cast<std::int64_t>(strip) * p.tiles + begin) * tile_bytes(kBits) + 16 * lane_;
    const unsigned char* metadata = p.metadata + expert * p.metadata_stride + 16 * lane_;
    if constexpr (kScaling == Scaling::kColumns) {
      for (int f = 0; f < kFragments; ++f) {
        // Padding rows have codes of 0, and any row of scales will do.
        int scale_row = (strip * kTileRows + f * kFragmentRows) / p.group_size;
        scale_row = scale_row < p.scale_rows ? scale_row : p.scale_rows - 1;
        metadata_[f] = metadata + (static_cast<std::int64_t>(scale_row) * p.tiles + begin) *
                                      kTileMetadataBytes;
      }
    } else {
      const int units = (p.tiles + kUnit - 1) / kUnit;
      metadata_[0] =
          metadata + (static_cast<std::int64_t>(strip) * units + begin / kUnit) * p.slot_bytes;
    }
  }

  // The stage that is multiplied.
  __device__ int tile() const { return tile_; }
  __device__ int tiles() const { return tiles_from(tile_); }
  __device__ bool done() const { return tile_ >= end_; }
  __device__ bool last() const { return tile_ + kStageTiles >= end_; }
  __device__ const unsigned char* codes() const { return ring_ + read_; }
  __device__ const unsigned char* metadata() const { return codes() + kCodesBytes; }
  // Axis 1: number, among the groups that metadata() holds, of that of a step of 16 columns.
  __device__ int group_in_slot(int step) const {
    return p_.group_steps(step) - p_.group_steps(tile_ / kUnit * kUnit * kSteps);
  }
  __device__ void advance() {
    tile_ += kStageTiles;
    read_ = next(read_);
  }

  // Starts the copies of the next stage that has not been asked for, if any, without a commit.
  __device__ __forceinline__ void request_next() {
    if (requested_ >= end_) return;
    const int count = tiles_from(requested_);
    unsigned char* slot = ring_ + write_ + 16 * lane_;
    if (count == kStageTiles) {
      copy<kCodesBytes>(slot, codes_);
    } else {
      copy(slot, codes_, count * tile_bytes(kBits));
    }
    slot += kCodesBytes;
    requested_ += kStageTiles;
    codes_ += kCodesBytes;
    if constexpr (kScaling == Scaling::kColumns) {
      for (int f = 0; f < kFragments; ++f) {
        constexpr int kBytes = kStageTiles * kTileMetadataBytes;
        copy(slot + f * kBytes, metadata_[f], count * kTileMetadataBytes);
        metadata_[f] += kBytes;
      }
    } else {
      copy(slot, metadata_[0], p_.slot_bytes);
      if (requested_ % kUnit == 0) metadata_[0] += p_.slot_bytes;
    }
    write_ = next(write_);
  }

 private:
  static constexpr int kUnit = unit_tiles(kBits);
  static constexpr int kWarpBytes = 32 * 16;  // that one instruction copies

  __device__ int tiles_from(int tile) const {
    return end_ - tile < kStageTiles ? end_ - tile : kStageTiles;
  }
  __device__ int next(int slot) const {
    slot += stage_bytes_;
    return slot == kDepth * stage_bytes_ ? 0 : slot;
  }
  // Both at the place of the lane.
  template <int kBytes>
  __device__ __forceinline__ void copy(unsigned char* to, const unsigned char* from) const {
#pragma unroll
    for (int at = 0; at < kBytes; at += kWarpBytes) {
      if (at + kWarpBytes <= kBytes || 16 * lane_ < kBytes - at) {
        simt::cp_async_16(to + at, from + at);
      }
    }
  }
  __device__ __forceinline__ void copy(unsigned char* to, const unsigned char* from,
                                       int bytes) const {
    if (16 * lane_ < bytes) simt::cp_async_16(to, from);
    if (bytes <= kWarpBytes) return;
#pragma unroll 1
    for (int at = kWarpBytes; at + 16 * lane_ < bytes; at += kWarpBytes) {
      simt::cp_async_16(to + at, from + at);
    }
  }

  const LinearParams& p_;
  int lane_, tile_, requested_, end_, stage_bytes_;
  unsigned char* ring_;
  int read_, write_;                                // bytes from the start of the ring
  const unsigned char* codes_;                      // of the next request, at the place of the lane
  const unsigned char* metadata_[kFragments] = {};  // likewise
};

// Scale and zero of rows g and g + 8 of a fragment.
struct RowPair {
  float scale[2], zero[2];
};
__device__ inline RowPair row_pair(const LinearParams& p, const unsigned char* group, int fragment,
                                   int g) {
  const int index = fragment * kFragmentRows / 2 + g;
  if (p.float_metadata) {
    const float4 v = ld_shared(reinterpret_cast<const float4*>(group) + index);
    return {{v.x, v.z}, {v.y, v.w}};
  }
  const uint2 v = ld_shared(reinterpret_cast<const uint2*>(group) + index);
  const auto value = [](std::uint32_t bits) {
    return F16::to_float(static_cast<std::uint16_t>(bits));
  };
  return {{value(v.x), value(v.y)}, {value(v.x >> 16), value(v.y >> 16)}};
}

// Axis 0: scale and zero of a lane's columns in one step.
template <class LaneCodes>
struct ColumnScales {
  std::uint32_t scale[2];  // columns 2 t and 2 t + 1, then 2 t + 8 and 2 t + 9
  std::uint32_t rest[2];
  std::uint32_t minus_part[4];  // for Codes::centered()

  __device__ __forceinline__ void load(const unsigned char* step, int t) {
    const auto* values = reinterpret_cast<const uint2*>(step);
    const uint2 s = ld_shared(values + t);
    const uint2 part = ld_shared(values + 4 + t);
    const uint2 r = ld_shared(values + 8 + t);
    scale[0] = s.x, scale[1] = s.y;
    rest[0] = r.x, rest[1] = r.y;
    minus_part[0] = LaneCodes::prepare2(part.x, 0);
    minus_part[1] = LaneCodes::prepare2(part.x, 1);
    minus_part[2] = LaneCodes::prepare2(part.y, 0);
    minus_part[3] = LaneCodes::prepare2(part.y, 1);
  }
  // a: code - part; becomes the weight.
  template <class T>
  __device__ __forceinline__ void apply(std::uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = T::fma2(a[i], scale[i / 2], rest[i / 2]);
  }
};

// Axis 1: of rows g and g + 8 of a fragment, twice in a word.
template <class LaneCodes>
struct RowScales {
  std::uint32_t scale[2], rest[2];
  std::uint32_t minus_part[4];

  template <class T>
  __device__ __forceinline__ void set(const RowPair& rows, int max_code) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const float part = integer_part(rows.zero[odd], max_code);
      scale[odd] = twice<T>(rows.scale[odd]);
      rest[odd] = twice<T>(-(rows.zero[odd] - part) * rows.scale[odd]);
      minus_part[odd] = minus_part[odd + 2] = twice<T>(LaneCodes::prepare(-part, odd));
    }
  }
  template <class T>
  __device__ __forceinline__ void apply(std::uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = T::fma2(a[i], scale[i % 2], rest[i % 2]);
  }
};

// A warp's sums, as mma leaves them, to sums[token][row] in shared memory.
template <int kTokenTiles>
__device__ __forceinline__ void store_strip(const float (&y)[kFragments][kTokenTiles][4], int lane,
                                            float* sums, int stride, int strip_row) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = strip_row + f * kFragmentRows + i / 2 * 8 + g;
        st_shared(sums + (8 * j + 2 * t + i % 2) * stride + row, y[f][j][i]);
      }
    }
  }
}

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

// Adds up the sums of all parts and, with splits, of all blocks, in a fixed order. Writes y.
template <class T>
__device__ void finish(const LinearParams& p, const float* sums, const BlockSums& s, int expert,
                       int split) {
  const int padded_rows = p.strips * kTileRows;
  const int quad_shift = p.row_shift - 2;  // a thread adds up four rows at a time
  const int quads = s.tokens << quad_shift;
  const int token_floats = sums_stride(1 << p.row_shift);
  const auto threads = static_cast<int>(blockDim.x);
  const auto token_of = [&](int quad) { return quad >> quad_shift; };
  const auto row_of = [&](int quad) { return 4 * (quad & ((1 << quad_shift) - 1)); };
  // Of split 0.
  const auto partial_of = [&](int quad) {
    return p.partials + (s.first_token + token_of(quad)) * padded_rows + s.first_row + row_of(quad);
  };
  const std::int64_t split_floats = p.rows * padded_rows;

  __syncthreads();
  for (int quad = static_cast<int>(threadIdx.x); quad < quads; quad += threads) {
    const int row = s.first_row + row_of(quad);
    if (row >= padded_rows) continue;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const float* part = sums + token_of(quad) * token_floats + row_of(quad);
#pragma unroll 2
    for (int i = 0; i < s.parts; ++i) {
      add(sum, ld_shared(reinterpret_cast<const float4*>(part)));
      part += s.block_tokens * token_floats;
    }
    if (p.splits == 1) {
      write_y<T>(p, expert, row, s.first_token + token_of(quad), sum);
    } else {
      st_global(reinterpret_cast<float4*>(partial_of(quad) + split * split_floats), sum);
    }
  }
  if (p.splits == 1) return;

  // The block that comes last adds up.
  const int row_blocks = (p.strips + p.strips_per_block - 1) / p.strips_per_block;
  if (!is_last_block(p, p.counters + s.first_token * row_blocks + (s.first_row >> p.row_shift))) {
    return;
  }
  for (int quad = static_cast<int>(threadIdx.x); quad < quads; quad += kLastQuads * threads) {
    float4 sum[kLastQuads];
    const float* partial[kLastQuads];
    bool inside[kLastQuads];
#pragma unroll
    for (int j = 0; j < kLastQuads; ++j) {
      const int mine = quad + j * threads;
      inside[j] = mine < quads && s.first_row + row_of(mine) < padded_rows;
      partial[j] = partial_of(mine);
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
          partial[j] += split_floats;
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
      write_y<T>(p, expert, s.first_row + row_of(mine), s.first_token + token_of(mine), sum[j]);
    }
  }
}

}  // namespace hqq::cuda::device

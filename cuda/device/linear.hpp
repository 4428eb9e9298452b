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
  return {ld_global(p.row_begin + expert), ld_global(p.row_begin + expert + 1)};
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

// Adds up sums[part][token][row] in shared memory, written by all warps of the block, and with
// splits the partial sums of the other blocks: in a fixed order. Writes y.
struct BlockSums {
  int parts, block_tokens;
  int first_row;  // in the order of tiles
  std::int64_t first_token;
  int tokens;
};

template <class T>
__device__ inline void write_y(const LinearParams& p, int expert, int row, std::int64_t token,
                               float value) {
  if (row >= p.N) return;
  // See RowOrder.
  const int n = p.group_size == 0 ? row : row % p.group_size * p.scale_rows + row / p.group_size;
  if (p.bias != nullptr) {
    value += T::to_float(ld_global(p.bias + static_cast<std::int64_t>(expert) * p.N + n));
  }
  st_global(p.y + token * p.y_stride + n, T::from_float(value));
}

template <class T>
__device__ void finish(const LinearParams& p, const float* sums, const BlockSums& s, int expert,
                       int split) {
  const int padded_rows = p.strips * kTileRows;
  const int block_rows = 1 << p.row_shift;
  const int values = s.tokens << p.row_shift;
  const auto threads = static_cast<int>(blockDim.x);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < values; i += threads) {
    const int row = s.first_row + (i & (block_rows - 1)), token = i >> p.row_shift;
    if (row >= padded_rows) continue;
    float sum = 0.0f;
    for (int part = 0; part < s.parts; ++part) {
      sum += ld_shared(sums + (part * s.block_tokens << p.row_shift) + i);
    }
    if (p.splits == 1) {
      write_y<T>(p, expert, row, s.first_token + token, sum);
    } else {
      st_global(p.partials + (split * p.rows + s.first_token + token) * padded_rows + row, sum);
    }
  }
  if (p.splits == 1) return;

  // The block that comes last adds up.
  auto* last = reinterpret_cast<unsigned*>(simt::shared_memory());
  const int row_blocks = (p.strips + p.strips_per_block - 1) / p.strips_per_block;
  unsigned* counter = p.counters + s.first_token * row_blocks + (s.first_row >> p.row_shift);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned before = atomicAdd(counter, 1u);
    st_shared(last, before + 1 == static_cast<unsigned>(p.splits) ? 1u : 0u);
  }
  __syncthreads();
  if (ld_shared(last) == 0) return;
  __threadfence();
  for (int i = static_cast<int>(threadIdx.x); i < values; i += threads) {
    const int row = s.first_row + (i & (block_rows - 1)), token = i >> p.row_shift;
    if (row >= padded_rows) continue;
    const float* partial = p.partials + (s.first_token + token) * padded_rows + row;
    float sum = 0.0f;
    for (int other = 0; other < p.splits; ++other) {
      sum += simt::ld_coherent(partial + other * p.rows * padded_rows);
    }
    write_y<T>(p, expert, row, s.first_token + token, sum);
  }
  if (threadIdx.x == 0) st_global(counter, 0u);
}

}  // namespace hqq::cuda::device

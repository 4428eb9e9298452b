// From format 1 to the order of the fused kernels (tile.hpp).
#pragma once

#include <cstdint>

#include "cuda/device/codes.hpp"
#include "cuda/device/fragments.hpp"
#include "cuda/device/tile.hpp"

namespace hqq::cuda::device {

// Rows in the order of tiles. Axis 1: as they are. Axis 0: the rows r, r + R, r + 2 R, ... that
// share row r of scales (R = rows / group_size) follow each other.
struct RowOrder {
  std::int64_t rows = 0;
  std::int64_t group_size = 0;  // axis 0; axis 1: 0

  __device__ std::int64_t row_at(std::int64_t place) const {
    if (group_size == 0) return place;
    return place % group_size * (rows / group_size) + place / group_size;
  }
};

struct RepackArgs {
  const std::uint8_t* W_q = nullptr;
  std::int64_t row_bytes = 0, cols = 0;
  RowOrder order;
  std::int64_t strips = 0, tiles = 0;  // tiles of a strip
  unsigned char* codes = nullptr;
};

// Words of one fragment, kBits of them, to a plane of a tile.
template <int kBits>
__device__ inline void store_plane(const std::uint32_t (&words)[kBits], unsigned char* plane,
                                   int lane, int fragment) {
  constexpr int kChunk = chunk_words(kBits);
  constexpr int kTogether = kBits < kChunk ? kBits : kChunk;
#pragma unroll
  for (int i = 0; i < kBits; i += kTogether) {
    const int word = fragment * kBits + i;
    unsigned char* out = plane + chunk_offset(kBits, word / kChunk, lane) + word % kChunk * 4;
    if constexpr (kTogether == 1) {
      st_global(reinterpret_cast<std::uint32_t*>(out), words[i]);
    } else if constexpr (kTogether == 2) {
      st_global(reinterpret_cast<uint2*>(out), make_uint2(words[i], words[i + 1]));
    } else {
      st_global(reinterpret_cast<uint4*>(out),
                make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]));
    }
  }
}

// A thread fills the words of one lane in one fragment of a tile. kSourceLow: as for load_codes().
template <int kSourceLow, int kHigh>
__global__ void repack_codes_kernel(RepackArgs args) {
  constexpr int kLow = kSourceLow == 0 ? 2 : kSourceLow;
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t tile = thread / (32 * kFragments);
  if (tile >= args.strips * args.tiles) return;
  const int fragment = static_cast<int>(thread / 32 % kFragments);
  const int lane = static_cast<int>(thread % 32), g = lane / 4, t = lane % 4;
  const std::int64_t first_place = tile / args.tiles * kTileRows + fragment * kFragmentRows;
  const std::int64_t first_col = tile % args.tiles * kTileCols;

  std::uint32_t low[kLow] = {};
  std::uint32_t high[kHigh > 0 ? kHigh : 1] = {};
#pragma unroll 1
  for (int odd = 0; odd < 2; ++odd) {
    const std::int64_t place = first_place + 8 * odd + g;
    if (place >= args.order.rows) continue;
    const std::uint8_t* row = args.W_q + args.order.row_at(place) * args.row_bytes;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const std::int64_t octet = first_col + pair * kOctet;
      if (octet >= args.cols) continue;
      const std::uint64_t codes = load_codes<kSourceLow, kHigh>(row, args.cols, octet);
      for (int half = 0; half < 2; ++half) {
        if (octet + 2 * t + half >= args.cols) continue;
        const auto code = static_cast<std::uint32_t>(codes >> (8 * (2 * t + half))) & 0xFFu;
        const int low_bit = field_bit(kLow, kLow, pair % pairs_per_word(kLow), odd);
        low[pair / pairs_per_word(kLow)] |= (code & ((1u << kLow) - 1)) << (16 * half + low_bit);
        if constexpr (kHigh > 0) {
          const int high_bit = field_bit(kHigh, kLow, pair % pairs_per_word(kHigh), odd);
          high[pair / pairs_per_word(kHigh)] |= code >> kLow << (16 * half + high_bit);
        }
      }
    }
  }
  unsigned char* out = args.codes + tile * tile_bytes(kLow + kHigh);
  store_plane<kLow>(low, out, lane, fragment);
  if constexpr (kHigh > 0) store_plane<kHigh>(high, out + tile_bytes(kLow), lane, fragment);
}

struct RepackMetadataArgs {
  Metadata scale, zero;
  DType type;  // of the result, kF16 or kF32
  std::int64_t rows = 0, cols = 0;
  void* metadata = nullptr;
  // Axis 1.
  std::int64_t groups = 0;                       // of a row
  std::int64_t strips = 0, units = 0;            // units of a strip
  std::int64_t unit_steps = 0, group_steps = 0;  // of 16 columns
  std::int64_t slot_groups = 0;                  // of a unit
  // Axis 0.
  std::int64_t scale_rows = 0, tiles = 0;
  int max_code = 0;
};

__device__ inline void store_value(DType type, void* values, std::int64_t i, float x) {
  if (type == DType::kF32) return st_global(static_cast<float*>(values) + i, x);
  st_global(static_cast<std::uint16_t*>(values) + i, F16::from_float(x));
}

// Axis 1. A thread writes scale and zero of one row and group of a unit.
__global__ void repack_row_metadata_kernel(RepackMetadataArgs args) {
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t entry = thread / kTileRows;  // strip, unit, group
  if (entry >= args.strips * args.units * args.slot_groups) return;
  const int place = static_cast<int>(thread % kTileRows);  // fragment, g, odd
  const std::int64_t strip = entry / (args.units * args.slot_groups);
  const std::int64_t unit = entry / args.slot_groups % args.units;
  const std::int64_t row = strip * kTileRows + place / kFragmentRows * kFragmentRows +
                           place % kFragmentRows / 2 + place % 2 * 8;
  const std::int64_t group = unit * args.unit_steps / args.group_steps + entry % args.slot_groups;
  float scale = 0.0f, zero = 0.0f;
  if (row < args.rows && group < args.groups) {
    scale = args.scale(row * args.groups + group);
    zero = args.zero(row * args.groups + group);
  }
  store_value(args.type, args.metadata, 2 * thread, scale);
  store_value(args.type, args.metadata, 2 * thread + 1, zero);
}

// Axis 0. A thread writes the three values of one row of scales and column.
template <class T>
__global__ void repack_column_metadata_kernel(RepackMetadataArgs args) {
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t width = args.tiles * kTileCols;
  if (thread >= args.scale_rows * width) return;
  const std::int64_t scale_row = thread / width;
  const std::int64_t step = thread % width / kStepCols;
  const int place = static_cast<int>(thread % kStepCols);  // t, upper eight, second of a pair
  const std::int64_t col = step * kStepCols + place / 4 * 2 + place / 2 % 2 * 8 + place % 2;
  float scale = 0.0f, zero = 0.0f;
  if (col < args.cols) {
    scale = args.scale(scale_row * args.cols + col);
    zero = args.zero(scale_row * args.cols + col);
  }
  const float part = integer_part(zero, args.max_code);
  auto* out = static_cast<std::uint16_t*>(args.metadata) +
              (scale_row * args.tiles * kSteps + step) * kColumnValues * kStepCols + place;
  st_global(out, T::from_float(scale));
  st_global(out + kStepCols, T::from_float(-part));
  st_global(out + 2 * kStepCols, T::from_float(-(zero - part) * scale));
}

}  // namespace hqq::cuda::device

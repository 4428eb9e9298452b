// The order of the fused kernels' weights (docs/cuda-kernels.md): which bit of which word of a tile
// holds which code. Plain arithmetic, for repacking, for the kernels and for sizes on the host.
#pragma once

#include <cmath>
#include <cstdint>

#include "hqq/bitpack.hpp"
#include "hqq/core/host_device.hpp"

namespace hqq::cuda::device {

// A tile is two A operands of four mma.m16n8k16 each: 32 rows, 64 columns.
inline constexpr int kTileRows = 32;
inline constexpr int kTileCols = 64;
inline constexpr int kStepCols = 16;  // of one mma
inline constexpr int kSteps = kTileCols / kStepCols;
inline constexpr int kFragments = 2;  // of 16 rows
inline constexpr int kFragmentRows = 16;

// Codes are stored as one or two planes of 1, 2, 4 or 8 bits, low bits first.
struct TilePlanes {
  int low, high;
  HQQ_HD constexpr int bits() const { return low + high; }
};

HQQ_HD constexpr TilePlanes tile_planes(BitWidth width) {
  switch (width) {
    case BitWidth::k8:
      return {8, 0};
    case BitWidth::k6:
      return {4, 2};
    case BitWidth::k5:
      return {4, 1};
    case BitWidth::k4:
      return {4, 0};
    case BitWidth::k3:
      return {2, 1};
    case BitWidth::k2:
    case BitWidth::kTernary:
      return {2, 0};
    case BitWidth::k1:
      return {1, 0};
  }
  return {0, 0};
}

HQQ_HD constexpr int tile_bytes(int bits) { return kTileRows * kTileCols / 8 * bits; }

// Lane 4 g + t of a warp holds, of each fragment and step, the codes that mma.m16n8k16 wants: rows
// g and g + 8 (`odd`), columns 2 t and 2 t + 1 (the two halves of a word), and the same eight
// columns on. A pair of columns is number 2 step + (column >= 8) of eight.
inline constexpr int kPairs = 2 * kSteps;

// Pairs (of both rows) that a word of a plane holds.
HQQ_HD constexpr int pairs_per_word(int bits) { return 8 / bits; }

// First bit, in each half of a word, of the code of row g + 8 odd. `low` is the width of the low
// plane: the rows of a pair are that far apart in both planes, so that one shift brings a pair into
// place.
HQQ_HD constexpr int field_bit(int bits, int low, int pair_in_word, int odd) {
  const int run = low / bits;  // pairs whose codes lie side by side
  return pair_in_word / run * 2 * low + pair_in_word % run * bits + odd * low;
}

// Words of a plane that a lane owns in a tile, and those that lie together (at most 16 bytes).
HQQ_HD constexpr int lane_words(int bits) { return kFragments * bits; }
HQQ_HD constexpr int chunk_words(int bits) { return lane_words(bits) < 4 ? lane_words(bits) : 4; }

// Byte offset, inside a plane of a tile, of a lane's chunk.
HQQ_HD constexpr int chunk_offset(int bits, int chunk, int lane) {
  return (chunk * 32 + lane) * chunk_words(bits) * 4;
}

// Tiles that are copied together when decoding, about 2 KB.
HQQ_HD constexpr int unit_tiles(int bits) { return bits >= 5 ? 1 : bits >= 3 ? 2 : 4; }

// ---- Metadata.

// Axis 1: for every strip of 32 rows and every unit of tiles, the groups that reach into it:
// fragment by fragment, g by g, (scale, zero) of row g and (scale, zero) of row g + 8, in 16 or 32
// bits each.
HQQ_HD constexpr int row_metadata_bytes(int value_bytes) { return kTileRows * 2 * value_bytes; }

// Axis 0: for every row of scales and every step of 16 columns: three rows of 16 values of the type
// of x (scale; minus the integer part of zero; minus the rest of zero times scale), columns in the
// order 0 1 8 9, 2 3 10 11, ..., so that a lane's four are contiguous.
inline constexpr int kColumnValues = 3;
inline constexpr int kStepMetadataBytes = kColumnValues * kStepCols * 2;
inline constexpr int kTileMetadataBytes = kSteps * kStepMetadataBytes;

// What is taken from a zero before it is multiplied with a scale in 16 bits: an integer in the
// range of the codes, so that code - part is exact.
HQQ_HD float integer_part(float zero, int max_code) {
  constexpr float kRound = 0x1.8p23f;  // of an ulp of 1
  return ::fminf(::fmaxf(zero, 0.0f), static_cast<float>(max_code)) + kRound - kRound;
}

}  // namespace hqq::cuda::device

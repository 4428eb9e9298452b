// The packing kCudaTiles (docs/cuda-kernels.md): which bit of which word of a tile holds which
// code. Plain arithmetic for kernels and for sizes on the host.
#pragma once

#include <cstdint>

#include "hqq/core/codec.hpp"

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
  constexpr bool operator==(const TilePlanes&) const = default;
};

// The planes of a row, but ternary codes take two bits. Host only, like core::row_format().
constexpr TilePlanes tile_planes(BitWidth width) {
  const core::RowFormat format = core::row_format(width);
  return {format.low_bits == 0 ? 2 : format.low_bits, format.high_bits};
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

// Rows in the order of tiles. Axis 1: as they are. Axis 0: the rows r, r + R, r + 2 R, ... that
// share row r of scales (R = rows / group_size) follow each other.
struct RowOrder {
  std::int64_t rows = 0;
  std::int64_t group_size = 0;  // axis 0; axis 1: 0

  HQQ_HD std::int64_t row_at(std::int64_t place) const {
    if (group_size == 0) return place;
    return place % group_size * (rows / group_size) + place / group_size;
  }
  HQQ_HD std::int64_t place_of(std::int64_t row) const {
    if (group_size == 0) return row;
    const std::int64_t scale_rows = rows / group_size;
    return row % scale_rows * group_size + row / scale_rows;
  }
};

// A row in tiles: its first tile, and its place there.
struct TiledRow {
  const unsigned char* tile;
  int fragment, g, odd;
};

struct TiledRows {
  const unsigned char* codes = nullptr;
  std::int64_t cols = 0;
  RowOrder order;
  std::int64_t tiles = 0;  // of a strip

  HQQ_HD TiledRow row(std::int64_t row, int bits) const {
    const std::int64_t place = order.place_of(row);
    const int in_strip = static_cast<int>(place % kTileRows);
    return {codes + place / kTileRows * tiles * tile_bytes(bits), in_strip / kFragmentRows,
            in_strip % 8, in_strip % kFragmentRows / 8};
  }
};

}  // namespace hqq::cuda::device

// Between format 1 and tiles (tiles.hpp).
#pragma once

#include "hqq/quantized_tensor.hpp"
#include "hqq/tiled_tensor.hpp"
#include "src/cpu/linear/tiles/field_packing.hpp"

namespace hqq::cpu {

// Bits a code takes in a tile: ternary codes are stored in two.
constexpr int stored_bits(BitWidth width) {
  const core::RowFormat format = core::row_format(width);
  return format.low_bits == 0 ? 2 : format.low_bits + format.high_bits;
}
static_assert(
    [] {
      for (const BitWidthInfo& info : kBitWidths) {
        if (field_packing_index(stored_bits(info.width)) < 0) return false;
      }
      return true;
    }(),
    "kFieldPackings has no row for a width of kBitWidths");

// Which rows a tile holds, and how large its parts are.
class TileOrder {
 public:
  TileOrder(const LayerConfig& config, const core::GroupLayout& layout);

  std::int64_t tiles() const { return tiles_; }
  std::int64_t units() const { return units_; }
  int bits() const { return bits_; }
  std::int64_t tile_bytes() const { return units_ * bits_ * kFieldBytes; }
  // Groups of a row, whose scales are part of a tile; 0 for axis 0, where whole rows of scales
  // apply to whole tiles.
  std::int64_t groups() const { return groups_; }
  // Axis 0: the row of scales that tile `tile` uses; tiles with the same one follow each other.
  std::int64_t scale_row(std::int64_t tile) const { return tile / tiles_per_scale_row_; }
  std::int64_t tiles_per_scale_row() const { return tiles_per_scale_row_; }
  // The row in lane `lane` of a tile; not below out_features in the padding of the last tile.
  std::int64_t row(std::int64_t tile, int lane) const {
    if (axis_ == 1) return tile * kTileRows + lane;
    const std::int64_t within = tile % tiles_per_scale_row_;
    return scale_row(tile) + scale_rows_ * (within * kTileRows + lane);
  }
  // Where a row is: {tile, lane}.
  std::pair<std::int64_t, int> position(std::int64_t row) const;

 private:
  int axis_;
  int bits_;
  std::int64_t tiles_, units_, groups_ = 0;
  std::int64_t scale_rows_ = 1, tiles_per_scale_row_ = 1;
};

// Codes of one tile of `q`, [units][bits][64] bytes.
void pack_tile(const QuantizedTensor& q, const TileOrder& order, std::int64_t tile,
               std::uint8_t* out);
// The rows of one tile back into q.W_q.
void unpack_tile(const std::uint8_t* codes, const TileOrder& order, std::int64_t tile,
                 QuantizedTensor& q);
// Codes of the rows of a tile, [16][units * 32].
void unpack_codes(const std::uint8_t* codes, const TileOrder& order, std::uint8_t* out);

// Scales or zeros of one tile of an axis-1 matrix, elements of `size` bytes: [rows][groups] <->
// [groups][16]. Lanes without a row get zeros.
void pack_metadata(const Tensor& rows, const TileOrder& order, std::int64_t tile, std::byte* out);
void unpack_metadata(const std::byte* in, const TileOrder& order, std::int64_t tile, Tensor& rows);

}  // namespace hqq::cpu

// The order of codes in a tile (docs/kernels.md, "Tiles"). A tile is 16 rows; a unit of it 32
// columns; a field of a unit four columns: byte 4 r + j of field f is the code of row r, column 4 f
// + j. The eight fields of a unit are packed into `bits` vectors of 64 bytes, byte by byte, as
// fields-inl.hpp says.
#pragma once

#include <cstdint>

namespace hqq::cpu {

inline constexpr int kTileRows = 16;
inline constexpr int kUnitCols = 32;
inline constexpr int kFieldCols = 4;
inline constexpr int kUnitFields = kUnitCols / kFieldCols;
inline constexpr int kFieldBytes = kTileRows * kFieldCols;
// Columns that share one scale of x in the fast mode. A block never crosses a group.
inline constexpr int kMaxBlockCols = 64;

}  // namespace hqq::cpu

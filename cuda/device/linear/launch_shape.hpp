// Sizes of the blocks of the linear kernels: what kernels and their launcher agree on.
#pragma once

#include "cuda/device/format/tile.hpp"

namespace hqq::cuda::device {

inline constexpr int kCounterShared = 16;  // bytes of shared memory before all else

// Floats between tokens in the sums of a block: those that a warp writes together then lie in
// different banks, and four rows still in one vector.
HQQ_HD constexpr int sums_stride(int block_rows) { return block_rows + 4; }

// The block that adds up splits loads so much at a time: four rows of that many tokens (or of other
// rows) and splits a thread.
inline constexpr int kLastQuads = 2;
inline constexpr int kLastSplits = 8;

// ---- Scales in shared memory

// Axis 1, RowScaleStream: groups that a lane loads at a time, and bytes of a group in its ring.
inline constexpr int kWindowGroups = 4;
HQQ_HD constexpr int row_entry_bytes(bool float_metadata) {
  return kTileRows * 2 * (float_metadata ? 4 : 2);
}

// Axis 0, ColumnScaleStream: columns that a lane loads at a time; three rows of 16 values for each
// step of a fragment; two slots.
inline constexpr int kLaneColumns = 2;
inline constexpr int kColumnStepBytes = 3 * kStepCols * 2;
inline constexpr int kColumnFragmentBytes = kSteps * kColumnStepBytes;
inline constexpr int kColumnRingBytes = 2 * kFragments * kColumnFragmentBytes;

// ---- decode_kernel

// Tiles that are copied together, about 2 KB.
HQQ_HD constexpr int unit_tiles(int bits) { return bits >= 5 ? 1 : bits >= 3 ? 2 : 4; }

inline constexpr int kDecodeWarps = 8;
inline constexpr int kDecodeThreads = 32 * kDecodeWarps;
// Units of tiles in a warp's ring: two are on their way, 4 KB, while one is multiplied.
inline constexpr int kDecodeRing = 3;

// 16-bit values between rows of x in shared memory: eight rows then lie in different banks.
HQQ_HD constexpr int decode_x_stride(int columns) { return columns + 8; }

// ---- gemm_kernel

inline constexpr int kGemmWarps = 4;  // a strip each
inline constexpr int kGemmThreads = 32 * kGemmWarps;
inline constexpr int kGemmTokens = 64;
inline constexpr int kGemmRing = 3;  // stages of one tile
inline constexpr int kGemmXStride = kTileCols + 8;
inline constexpr int kGemmXBytes = kGemmTokens * kGemmXStride * 2;  // of a stage

}  // namespace hqq::cuda::device

// The kernels of one instruction set behind hqq::cpu::linear. They trust their arguments, allocate
// nothing and know nothing of threads; driver.cpp feeds them.
#pragma once

#include <cstdint>

#include "src/cpu/linear/tiles/field_packing.hpp"

namespace hqq::cpu {

// A piece of a row of up to kMaxBlockCols columns inside one group.
struct Block {
  std::int32_t first_col;
  std::int32_t cols;  // before padding
  std::int32_t group;
};

// What a kernel knows of one row of x in one block.
struct BlockOfX {
  float scale;  // fast: x = scale * code; exact: 1
  float sum;    // fast: of the codes; exact: of the values
};

// One row of x, padded with zeros to whole units.
struct RowOfX {
  const std::int8_t* codes;  // fast
  const float* values;       // exact
  const BlockOfX* blocks;
};

// How the columns of a tile are divided.
struct ColumnPlan {
  std::int64_t units;
  const Block* blocks;
  std::int64_t num_blocks;
  std::int64_t num_groups;
  // Every block but the last has so many units, or 0: blocks begin or end inside a unit.
  std::int64_t block_units;
  std::int64_t group_blocks;  // blocks of every group but the last
};

enum class MetaType { kF16, kF32 };

// Tiles that a decode kernel takes at a time, in step: a core reads two streams of memory faster
// than one. Where unpacking takes longer than reading, there is nothing to gain.
inline constexpr int kMaxTiles = 2;
constexpr int decode_tiles(bool fast, int bits, int rows) {
  return rows == 1 && (!fast || bits >= 4) ? 2 : 1;
}

// y[tile][m][r] = sum over groups of scale[r] * (sum (code - zero[r]) * x[m]).
struct TileArgs {
  const std::uint8_t* codes[kMaxTiles];  // [units][bits][64]
  const void* scale[kMaxTiles];          // [num_groups][16] of the MetaType
  const void* zero[kMaxTiles];
  const ColumnPlan* plan;
  const RowOfX* x;
  float* y;  // [tiles][rows of x of the kernel][16]
};
using TileKernel = void (*)(const TileArgs& args);

// Units of a panel: its codes (8 KiB) or float32 weights (16 KiB) stay in the first-level cache
// while all rows of x pass.
inline constexpr int kPanelUnitsFast = 16;
inline constexpr int kPanelUnitsExact = 8;
// A panel may begin and end inside a unit. The larger of bytes and float32 values.
inline constexpr int kPanelScratchBytes = (kPanelUnitsExact + 2) * kUnitCols * kTileRows * 4;
static_assert(kPanelScratchBytes >= (kPanelUnitsFast + 2) * kUnitFields * kFieldBytes);

// A part of a tile, unpacked, and all rows of x.
struct PanelArgs {
  const std::uint8_t* codes;  // packed codes of the tile
  const float* scale;         // [num_groups][16]
  const float* zero;
  const ColumnPlan* plan;
  std::int64_t first_block, end_block;  // blocks of the panel
  const RowOfX* x;
  std::int64_t rows;
  void* scratch;  // [kPanelScratchBytes]
  float* y;       // [rows][16], added to
};
using PanelKernel = void (*)(const PanelArgs& args);

struct LinearKernels {
  const char* name;
  // Few rows of x straight from packed codes; plan.block_units > 0. Null: the panels do it.
  // [field packing][1, 2, 4 rows][MetaType]; exact: [field packing][1, 4 rows][MetaType].
  TileKernel decode_fast[kNumFieldPackings][3][2];
  TileKernel decode_exact[kNumFieldPackings][2][2];
  // Any number of rows, any plan.
  PanelKernel panel_fast[kNumFieldPackings];
  PanelKernel panel_exact[kNumFieldPackings];
  // x [cols] times factor (or null) -> int8 codes and blocks. Codes are padded with zeros.
  void (*quantize_x)(const float* x, const float* factor, const ColumnPlan& plan,
                     std::int8_t* codes, BlockOfX* blocks);
  // Copies x for the exact mode. `shifted`: as the decode kernels take it.
  void (*copy_x)(const float* x, const float* factor, const ColumnPlan& plan, bool shifted,
                 float* values, BlockOfX* blocks);
  // sum of values * weights [plan.units * 32], where copy_x made the values.
  float (*weighted_sum)(const float* values, const float* weights, const ColumnPlan& plan,
                        bool shifted);
  // quantize_x with a factor `scale` [cols] of the MetaType, which also returns the sum of zero
  // [cols] times x as rounded.
  float (*quantize_scaled_x)(const float* x, const void* scale, const void* zero, MetaType type,
                             const ColumnPlan& plan, std::int8_t* codes, BlockOfX* blocks);
  // uint8 [groups][16] -> code * step [16] + offset [16].
  void (*read_u8)(const std::uint8_t* in, std::int64_t groups, const float* step,
                  const float* offset, float* out);
  // float16 [count] -> float32.
  void (*read_f16)(const std::uint16_t* in, std::int64_t count, float* out);
};

namespace scalar {
const LinearKernels& linear_kernels();
}
namespace avx2 {
const LinearKernels& linear_kernels();
}
namespace avx2_vnni {
const LinearKernels& linear_kernels();
}
namespace avx512 {
const LinearKernels& linear_kernels();
}
namespace avx512_vnni {
const LinearKernels& linear_kernels();
}
namespace neon {
const LinearKernels& linear_kernels();
}

}  // namespace hqq::cpu

// What a launch tells the linear kernels. Plain data: the host fills it.
#pragma once

#include <cstdint>

#include "cuda/api.hpp"
#include "hqq/core/host_device.hpp"

namespace hqq::cuda::device {

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

// Scale or zero in format 1.
struct MetadataParams {
  DType type = DType::kF16;
  const unsigned char* values = nullptr;  // of expert 0
  const unsigned char* step = nullptr;    // float32, of kU8
  const unsigned char* offset = nullptr;
  std::int64_t stride = 0, step_stride = 0, offset_stride = 0;  // bytes between experts
};

// How a kernel applies scale and zero.
enum class Scaling {
  kSums,     // axis 1: to sums over (parts of) groups, in float32
  kRows,     // axis 1: to weights, in 16 bits
  kColumns,  // axis 0: to weights, in 16 bits
};

struct LinearParams {
  const unsigned char* codes = nullptr;  // of expert 0
  std::int64_t codes_stride = 0;         // bytes between experts
  MetadataParams scale, zero;
  // Both in float16 or both in bfloat16; then whether one load may read all values that a lane
  // reads at a time.
  bool half_scales = false;
  bool scales_aligned = false;
  DType col_scale_type = DType::kF16;
  const unsigned char* col_scale = nullptr;  // or null
  std::int64_t col_scale_stride = 0;
  int N = 0, K = 0;
  int strips = 0, tiles = 0;  // tiles of a strip
  // Axis 1.
  Divider group_steps;          // group_size in steps of 16 columns
  int groups = 0;               // of a row
  bool float_metadata = false;  // as the kernel holds it; else float16
  int ring_groups = 0;          // in shared memory, a power of two
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
  // Shared memory: where the warps' parts begin, and the size of one.
  int warps_offset = 0, warp_bytes = 0;
  float* partials = nullptr;     // [splits, rows, 32 strips], with splits > 1
  unsigned* counters = nullptr;  // zeros
};

// x [rows, ceil8(K)] for the copies of gemm_kernel: aligned, times col_scale.
struct PrepareArgs {
  std::uint16_t* out = nullptr;
  std::int64_t out_stride = 0;
};

}  // namespace hqq::cuda::device

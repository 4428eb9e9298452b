// W_r = (W_q - zero) * scale * col_scale: a thread has eight neighbouring weights of a row, so that
// loads of codes and 16-byte stores of the result are contiguous over a warp.
#pragma once

#include "cuda/device/format/codes.hpp"
#include "cuda/device/format/metadata.hpp"
#include "cuda/device/format/tiles.hpp"

namespace hqq::cuda::device {

struct DequantizeParams {
  core::GroupLayout layout;
  std::int64_t num_groups = 0;
  std::int64_t groups_per_row = 0;    // axis 1
  const std::uint8_t* W_q = nullptr;  // of kFormat1
  std::int64_t row_bytes = 0;
  TiledRows tiles;  // of kCudaTiles
  Metadata scale{}, zero{};
  DType col_scale_type = DType::kF16;
  const void* col_scale = nullptr;
  const std::int64_t* ids = nullptr;  // rows to read, or null: all in order
  std::int64_t out_rows = 0;
  void* out = nullptr;
  DType out_type = DType::kF16;
};

inline constexpr int kDequantizeThreads = 256;

// count values to element `at` of `out`; 16 bytes at a time where they are aligned.
template <class Convert, class T>
__device__ inline void store_octet(T* out, std::int64_t at, const float (&values)[kOctet],
                                   int count, Convert convert) {
  constexpr int kPerStore = 16 / static_cast<int>(sizeof(T));
  const bool aligned = reinterpret_cast<std::uintptr_t>(out + at) % 16 == 0;
  if (!aligned || count < kOctet) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (i < count) st_global(out + at + i, convert(values[i]));
    }
    return;
  }
#pragma unroll
  for (int first = 0; first < kOctet; first += kPerStore) {
    uint4 bits;
    T parts[kPerStore];
#pragma unroll
    for (int i = 0; i < kPerStore; ++i) parts[i] = convert(values[first + i]);
    static_assert(sizeof(parts) == sizeof(bits));
    memcpy(&bits, parts, sizeof(bits));
    st_global(reinterpret_cast<uint4*>(out + at + first), bits);
  }
}

template <Packing kPacking, int kLow, int kHigh>
__device__ inline std::uint64_t octet_of(const DequantizeParams& p, std::int64_t row,
                                         std::int64_t col) {
  if constexpr (kPacking == Packing::kFormat1) {
    return load_codes<kLow, kHigh>(p.W_q + row * p.row_bytes, p.layout.cols, col);
  } else {
    return load_tile_codes<kLow, kHigh>(p.tiles.row(row, (kLow == 0 ? 2 : kLow) + kHigh), col);
  }
}

template <Packing kPacking, int kLow, int kHigh>
__device__ inline void dequantize_octet(const DequantizeParams& p, std::int64_t out_row,
                                        std::int64_t col) {
  const std::int64_t cols = p.layout.cols;
  const std::int64_t row = p.ids == nullptr ? out_row : ld_global(p.ids + out_row);
  const std::uint64_t codes = octet_of<kPacking, kLow, kHigh>(p, row, col);
  const int count = cols - col < kOctet ? static_cast<int>(cols - col) : kOctet;
  float values[kOctet] = {};
  if (p.layout.axis == 1) {
    const std::int64_t group = row * p.groups_per_row + col / p.layout.group_size;
    const float scale = p.scale(group);
    const float zero = p.zero(group);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      values[i] = (octet_code(codes, i) - zero) * scale;
    }
  } else {
    std::int64_t group = (row * cols + col) % p.num_groups;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (i < count) {
        values[i] = (octet_code(codes, i) - p.zero(group)) * p.scale(group);
      }
      group = group + 1 == p.num_groups ? 0 : group + 1;
    }
  }
  if (p.col_scale != nullptr) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (i < count) values[i] = values[i] * load_float(p.col_scale_type, p.col_scale, col + i);
    }
  }
  const std::int64_t at = out_row * cols + col;
  switch (p.out_type) {
    case DType::kF16:
      return store_octet(static_cast<std::uint16_t*>(p.out), at, values, count,
                         [](float x) { return F16::from_float(x); });
    case DType::kBF16:
      return store_octet(static_cast<std::uint16_t*>(p.out), at, values, count,
                         [](float x) { return BF16::from_float(x); });
    case DType::kF64:
      return store_octet(static_cast<double*>(p.out), at, values, count,
                         [](float x) { return static_cast<double>(x); });
    default:
      return store_octet(static_cast<float*>(p.out), at, values, count, [](float x) { return x; });
  }
}

// Grid: the octets of all rows. One each: 1,500 threads of a multiprocessor have enough loads under
// way, and a loop over several makes the code larger than the instruction cache.
template <Packing kPacking, int kLow, int kHigh>
__global__ void dequantize_kernel(const DequantizeParams p) {
  const std::int64_t per_row = (p.layout.cols + kOctet - 1) / kOctet;
  const std::int64_t total = per_row * p.out_rows;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kDequantizeThreads + threadIdx.x;
  if (i >= total) return;
  // A division of 32 bits takes a third of the time of one of 64.
  const std::int64_t row = total <= 0xFFFFFFFFll
                               ? static_cast<std::uint32_t>(i) / static_cast<std::uint32_t>(per_row)
                               : i / per_row;
  dequantize_octet<kPacking, kLow, kHigh>(p, row, (i - row * per_row) * kOctet);
}

}  // namespace hqq::cuda::device

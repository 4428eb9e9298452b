// Writing rows of format 1 on the device.
#pragma once

#include <cstdint>

#include "cuda/device/simt/simt.hpp"
#include "hqq/core/codec.hpp"

namespace hqq::cuda::device {

// The low `bytes` (1, 2, 4 or 8, or fewer at the end of a row) of a word. Rows may begin at any
// address.
__device__ inline void store_packed(std::uint64_t word, std::int64_t bytes, std::uint8_t* out) {
  const auto address = reinterpret_cast<std::uintptr_t>(out);
  if (bytes == 8 && address % 8 == 0) {
    return st_global(reinterpret_cast<std::uint64_t*>(out), word);
  }
  if (bytes == 4 && address % 4 == 0) {
    return st_global(reinterpret_cast<std::uint32_t*>(out), static_cast<std::uint32_t>(word));
  }
  for (std::int64_t i = 0; i < bytes; ++i) {
    st_global(out + i, static_cast<std::uint8_t>(word >> (8 * i)));
  }
}

// Up to eight codes, one a byte, as part of a plane of `bits` bits.
__device__ inline void store_plane(int bits, std::uint64_t codes, std::int64_t n,
                                   std::uint8_t* out) {
  codes &= core::byte_mask(bits);
  std::uint64_t word = codes;
  if (bits == 4) word = core::gather_bits<4>(codes);
  if (bits == 2) word = core::gather_bits<2>(codes);
  if (bits == 1) word = core::gather_bits<1>(codes);
  store_packed(word, core::plane_bytes(bits, n), out);
}

// Packs one block of n codes, which next() returns one after the other.
template <class Next>
__device__ inline void pack_block(core::RowFormat format, std::int64_t n, Next& next,
                                  std::uint8_t* out) {
  if (format.low_bits == 0) {
    for (std::int64_t i = 0; i < n; i += core::kTernaryDigits) {
      const std::int64_t count = n - i < core::kTernaryDigits ? n - i : core::kTernaryDigits;
      std::uint32_t value = 0;
      std::uint32_t power = 1;
      for (std::int64_t d = 0; d < count; ++d, power *= 3) value += next() * power;
      st_global(out++, static_cast<std::uint8_t>(value));
    }
    return;
  }
  std::uint8_t* high = out + core::plane_bytes(format.low_bits, n);
  for (std::int64_t i = 0; i < n; i += 8) {
    const std::int64_t count = n - i < 8 ? n - i : 8;
    std::uint64_t codes = 0;
    for (std::int64_t d = 0; d < count; ++d) codes |= std::uint64_t{next()} << (8 * d);
    store_plane(format.low_bits, codes, count, out);
    out += format.low_bits;
    if (format.high_bits == 0) continue;
    store_plane(format.high_bits, codes >> format.low_bits, count, high);
    high += format.high_bits;
  }
}

// Where codes go.
struct PackedRows {
  std::uint8_t* W_q = nullptr;
  std::int64_t row_bytes = 0;
  core::RowFormat format{};
  // `col` is a multiple of format.block.
  __device__ std::uint8_t* at(std::int64_t row, std::int64_t col) const {
    return W_q + row * row_bytes + col / format.block * core::block_bytes(format, format.block);
  }
};

}  // namespace hqq::cuda::device

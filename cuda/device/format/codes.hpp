// Reading codes of format 1 on the device, eight at a time.
#pragma once

#include <cstdint>

#include "cuda/device/simt/simt.hpp"
#include "hqq/core/codec.hpp"

namespace hqq::cuda::device {

// Codes that a thread handles together. Groups are multiples of it, so that they share scale and
// zero with axis 1.
inline constexpr int kOctet = 8;

// kBytes bytes (1, 2, 4, 8) from any address, as the low end of a word.
template <int kBytes>
__device__ inline std::uint64_t load_unaligned(const std::uint8_t* p) {
  const auto address = reinterpret_cast<std::uintptr_t>(p);
  if (address % kBytes == 0) {
    if constexpr (kBytes == 8) return ld_global(reinterpret_cast<const unsigned long long*>(p));
    if constexpr (kBytes == 4) return ld_global(reinterpret_cast<const std::uint32_t*>(p));
    if constexpr (kBytes == 2) return ld_global(reinterpret_cast<const std::uint16_t*>(p));
    if constexpr (kBytes == 1) return ld_global(p);
  }
  std::uint64_t word = 0;
  for (int i = 0; i < kBytes; ++i) word |= static_cast<std::uint64_t>(ld_global(p + i)) << (8 * i);
  return word;
}

// Up to eight codes of one plane, one a byte; `count` of them exist.
template <int kBits>
__device__ inline std::uint64_t load_plane(const std::uint8_t* p, int count) {
  if (count == kOctet) return core::scatter_bits<kBits>(load_unaligned<kBits>(p));
  std::uint64_t word = 0;
  const int bytes = static_cast<int>(core::plane_bytes(kBits, count));
  for (int i = 0; i < bytes; ++i) word |= static_cast<std::uint64_t>(ld_global(p + i)) << (8 * i);
  return core::scatter_bits<kBits>(word);
}

// Codes [col, col + 8) of a packed row of `cols` codes, one a byte, for the planes of a RowFormat;
// kLow = 0: ternary. col is a multiple of 8; bytes of codes beyond the row are not defined.
template <int kLow, int kHigh>
__device__ inline std::uint64_t load_codes(const std::uint8_t* row, std::int64_t cols,
                                           std::int64_t col) {
  const int count = cols - col < kOctet ? static_cast<int>(cols - col) : kOctet;
  if constexpr (kLow == 0) {
    const std::uint8_t* block = row + col / core::kTernaryBlock * core::kTernaryBlockBytes;
    const int first = static_cast<int>(col % core::kTernaryBlock);
    std::uint64_t codes = 0;
    int at = first / core::kTernaryDigits;
    int value = ld_global(block + at);
    for (int d = first % core::kTernaryDigits; d > 0; --d) value /= 3;
    for (int i = 0; i < count; ++i) {
      if ((first + i) / core::kTernaryDigits != at) value = ld_global(block + ++at);
      codes |= static_cast<std::uint64_t>(value % 3) << (8 * i);
      value /= 3;
    }
    return codes;
  } else if constexpr (kHigh == 0) {
    return load_plane<kLow>(row + col / kOctet * kLow, count);
  } else {
    constexpr int kBlock = 32;  // of every format with two planes
    const std::int64_t begin = col / kBlock * kBlock;
    const std::int64_t in_block = cols - begin < kBlock ? cols - begin : kBlock;
    const std::uint8_t* block = row + begin / kOctet * (kLow + kHigh);
    const std::int64_t octet = (col - begin) / kOctet;
    const std::uint8_t* high = block + core::plane_bytes(kLow, in_block) + octet * kHigh;
    return load_plane<kLow>(block + octet * kLow, count) | load_plane<kHigh>(high, count) << kLow;
  }
}

// Code i of eight, as a float: by its half of the word, since conversions of 64 bits are slow.
__device__ inline float octet_code(std::uint64_t codes, int i) {
  const auto half = static_cast<std::uint32_t>(i < 4 ? codes : codes >> 32);
  return static_cast<float>(half >> (8 * (i % 4)) & 0xFFu);
}

}  // namespace hqq::cuda::device

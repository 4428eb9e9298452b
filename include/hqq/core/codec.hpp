// Packing of codes into rows, for every bit width (docs/format.md, "Packed rows"), whose formats
// are in hqq/bit_width.hpp.
#pragma once

#include <cstdint>
#include <cstring>

#include "hqq/bit_width.hpp"
#include "hqq/core/host_device.hpp"

namespace hqq::core {

inline constexpr int kTernaryDigits = 5;  // 3^5 = 243 fits a byte
inline constexpr int kTernaryMaxByte = 242;
inline constexpr int kTernaryBlock = row_format(BitWidth::kTernary).block;
inline constexpr int kTernaryBlockBytes = (kTernaryBlock + kTernaryDigits - 1) / kTernaryDigits;

// Bytes n codes of one plane take.
HQQ_HD constexpr std::int64_t plane_bytes(int bits, std::int64_t n) { return (n * bits + 7) / 8; }

// Bytes one block of n codes takes (n <= block).
HQQ_HD constexpr std::int64_t block_bytes(RowFormat format, std::int64_t n) {
  if (format.low_bits == 0) return (n + kTernaryDigits - 1) / kTernaryDigits;
  return plane_bytes(format.low_bits, n) + plane_bytes(format.high_bits, n);
}

HQQ_HD constexpr std::int64_t row_bytes(RowFormat format, std::int64_t cols) {
  return cols / format.block * block_bytes(format, format.block) +
         block_bytes(format, cols % format.block);
}

// Eight codes, one a byte in `codes` (the first in the lowest), each below 2^kBits -> kBits bytes
// in the low end of the result. Every step halves the distance between neighbours.
template <int kBits>
HQQ_HD std::uint64_t gather_bits(std::uint64_t codes) {
  static_assert(kBits == 8 || kBits == 4 || kBits == 2 || kBits == 1);
  if constexpr (kBits == 8) return codes;
  if constexpr (kBits == 1) {
    codes |= codes >> 7;  // pairs in bits 0-1 of every second byte
    codes &= 0x0003000300030003u;
    codes |= codes >> 14;
    codes &= 0x0000000F0000000Fu;
    return (codes | codes >> 28) & 0xFFu;
  }
  if constexpr (kBits == 2) {
    codes |= codes >> 6;
    codes &= 0x000F000F000F000Fu;
    codes |= codes >> 12;
    codes &= 0x000000FF000000FFu;
    return (codes | codes >> 24) & 0xFFFFu;
  }
  codes |= codes >> 4;
  codes &= 0x00FF00FF00FF00FFu;
  codes |= codes >> 8;
  codes &= 0x0000FFFF0000FFFFu;
  return (codes | codes >> 16) & 0xFFFFFFFFu;
}

// The inverse of gather_bits.
template <int kBits>
HQQ_HD std::uint64_t scatter_bits(std::uint64_t packed) {
  if constexpr (kBits == 8) return packed;
  if constexpr (kBits == 1) {
    packed = (packed | packed << 28) & 0x0000000F0000000Fu;
    packed = (packed | packed << 14) & 0x0003000300030003u;
    return (packed | packed << 7) & 0x0101010101010101u;
  }
  if constexpr (kBits == 2) {
    packed = (packed | packed << 24) & 0x000000FF000000FFu;
    packed = (packed | packed << 12) & 0x000F000F000F000Fu;
    return (packed | packed << 6) & 0x0303030303030303u;
  }
  packed = (packed | packed << 16) & 0x0000FFFF0000FFFFu;
  packed = (packed | packed << 8) & 0x00FF00FF00FF00FFu;
  return (packed | packed << 4) & 0x0F0F0F0F0F0F0F0Fu;
}

// The mask of the low `bits` bits of every byte.
HQQ_HD constexpr std::uint64_t byte_mask(int bits) {
  return 0x0101010101010101u * ((std::uint64_t{1} << bits) - 1);
}

// memcpy of up to eight bytes: little-endian by definition of the format.
HQQ_HD std::uint64_t load_bytes(const std::uint8_t* p, std::int64_t n) {
  std::uint64_t word = 0;
  if (n >= 8) {
    std::memcpy(&word, p, 8);
  } else {
    for (std::int64_t i = 0; i < n; ++i) word |= static_cast<std::uint64_t>(p[i]) << (8 * i);
  }
  return word;
}
HQQ_HD void store_bytes(std::uint64_t word, std::uint8_t* p, std::int64_t n) {
  if (n >= 8) {
    std::memcpy(p, &word, 8);
  } else {
    for (std::int64_t i = 0; i < n; ++i) p[i] = static_cast<std::uint8_t>(word >> (8 * i));
  }
}

// One plane of n codes (any n >= 0): bits [shift, shift + kBits) of every code.
template <int kBits>
HQQ_HD void pack_plane(int shift, const std::uint8_t* codes, std::int64_t n, std::uint8_t* out) {
  const std::uint64_t mask = byte_mask(kBits);
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const std::uint64_t packed = gather_bits<kBits>((load_bytes(codes + i, 8) >> shift) & mask);
    std::memcpy(out + i / 8 * kBits, &packed, static_cast<std::size_t>(kBits));
  }
  if (i < n) {
    const std::uint64_t packed = gather_bits<kBits>((load_bytes(codes + i, n - i) >> shift) & mask);
    store_bytes(packed, out + i / 8 * kBits, plane_bytes(kBits, n - i));
  }
}

// Writes the plane to `codes`; with shift > 0 adds it to the lower plane that is there.
template <int kBits>
HQQ_HD void unpack_plane(int shift, const std::uint8_t* packed, std::int64_t n,
                         std::uint8_t* codes) {
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, packed + i / 8 * kBits, static_cast<std::size_t>(kBits));
    word = scatter_bits<kBits>(word) << shift;
    if (shift > 0) word |= load_bytes(codes + i, 8);
    std::memcpy(codes + i, &word, 8);
  }
  if (i < n) {
    std::uint64_t word = load_bytes(packed + i / 8 * kBits, plane_bytes(kBits, n - i));
    word = scatter_bits<kBits>(word) << shift;
    if (shift > 0) word |= load_bytes(codes + i, n - i);
    store_bytes(word, codes + i, n - i);
  }
}

// Run-time widths: the planes of kBitWidths, and nothing else.
HQQ_HD void pack_plane(int bits, int shift, const std::uint8_t* codes, std::int64_t n,
                       std::uint8_t* out) {
  if (bits == 8) return pack_plane<8>(shift, codes, n, out);
  if (bits == 4) return pack_plane<4>(shift, codes, n, out);
  if (bits == 2) return pack_plane<2>(shift, codes, n, out);
  return pack_plane<1>(shift, codes, n, out);
}
HQQ_HD void unpack_plane(int bits, int shift, const std::uint8_t* packed, std::int64_t n,
                         std::uint8_t* codes) {
  if (bits == 8) return unpack_plane<8>(shift, packed, n, codes);
  if (bits == 4) return unpack_plane<4>(shift, packed, n, codes);
  if (bits == 2) return unpack_plane<2>(shift, packed, n, codes);
  return unpack_plane<1>(shift, packed, n, codes);
}

HQQ_HD void pack_ternary(const std::uint8_t* codes, std::int64_t n, std::uint8_t* out) {
  for (std::int64_t i = 0; i < n; i += kTernaryDigits) {
    const std::int64_t count = n - i < kTernaryDigits ? n - i : kTernaryDigits;
    int value = 0;
    for (std::int64_t d = count - 1; d >= 0; --d) value = value * 3 + codes[i + d];
    out[i / kTernaryDigits] = static_cast<std::uint8_t>(value);
  }
}

HQQ_HD void unpack_ternary(const std::uint8_t* packed, std::int64_t n, std::uint8_t* codes) {
  for (std::int64_t i = 0; i < n; i += kTernaryDigits) {
    const std::int64_t count = n - i < kTernaryDigits ? n - i : kTernaryDigits;
    int value = packed[i / kTernaryDigits];
    for (std::int64_t d = 0; d < count; ++d) {
      codes[i + d] = static_cast<std::uint8_t>(value % 3);
      value /= 3;
    }
  }
}

// One block of n codes (n <= format.block).
HQQ_HD void pack_block(RowFormat format, const std::uint8_t* codes, std::int64_t n,
                       std::uint8_t* out) {
  if (format.low_bits == 0) return pack_ternary(codes, n, out);
  pack_plane(format.low_bits, 0, codes, n, out);
  if (format.high_bits > 0) {
    pack_plane(format.high_bits, format.low_bits, codes, n, out + plane_bytes(format.low_bits, n));
  }
}

HQQ_HD void unpack_block(RowFormat format, const std::uint8_t* packed, std::int64_t n,
                         std::uint8_t* codes) {
  if (format.low_bits == 0) return unpack_ternary(packed, n, codes);
  unpack_plane(format.low_bits, 0, packed, n, codes);
  if (format.high_bits > 0) {
    unpack_plane(format.high_bits, format.low_bits, packed + plane_bytes(format.low_bits, n), n,
                 codes);
  }
}

// A whole row. Formats of one plane need no blocks.
HQQ_HD void pack_row(RowFormat format, const std::uint8_t* codes, std::int64_t cols,
                     std::uint8_t* out) {
  if (format.low_bits > 0 && format.high_bits == 0) {
    return pack_plane(format.low_bits, 0, codes, cols, out);
  }
  const std::int64_t full = block_bytes(format, format.block);
  for (std::int64_t i = 0; i < cols; i += format.block, out += full) {
    pack_block(format, codes + i, cols - i < format.block ? cols - i : format.block, out);
  }
}

HQQ_HD void unpack_row(RowFormat format, const std::uint8_t* packed, std::int64_t cols,
                       std::uint8_t* codes) {
  if (format.low_bits > 0 && format.high_bits == 0) {
    return unpack_plane(format.low_bits, 0, packed, cols, codes);
  }
  const std::int64_t full = block_bytes(format, format.block);
  for (std::int64_t i = 0; i < cols; i += format.block, packed += full) {
    unpack_block(format, packed, cols - i < format.block ? cols - i : format.block, codes + i);
  }
}

}  // namespace hqq::core

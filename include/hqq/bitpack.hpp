// Bit widths and the packed row layout of format 1 (docs/format.md).
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

namespace hqq {

// The widths HQQ knows. kTernary is what users write as nbits = 1.58: three levels.
enum class BitWidth : std::uint8_t { k8, k6, k5, k4, k3, k2, kTernary, k1 };

inline constexpr BitWidth kAllBitWidths[] = {BitWidth::k8,       BitWidth::k6, BitWidth::k5,
                                             BitWidth::k4,       BitWidth::k3, BitWidth::k2,
                                             BitWidth::kTernary, BitWidth::k1};

// 8, 6, 5, 4, 3, 2, 1.58 or 1, the number users write.
double nbits_of(BitWidth width);
// The inverse; nullopt for any other number.
std::optional<BitWidth> bit_width_from_nbits(double nbits);
// "8, 6, 5, 4, 3, 2, 1.58, 1", for messages.
std::string supported_nbits();
// Largest code: 2^nbits - 1, and 2 for ternary.
int max_code(BitWidth width);

// Bytes a packed row of `cols` codes takes.
std::int64_t packed_row_bytes(BitWidth width, std::int64_t cols);
// Column slices are valid packed rows when they start at a multiple of this: 8 / 4 / 2 / 1 weights
// fill a byte, 32 a block of bit planes, 64 a block of ternary codes.
std::int64_t slice_alignment(BitWidth width);

// Packs one row. `codes` holds values 0..max_code; `packed` has packed_row_bytes() bytes.
void pack_row(BitWidth width, std::span<const std::uint8_t> codes, std::span<std::uint8_t> packed);
// The inverse. Ternary bytes above 242, which no packer writes, give codes all the same;
// verify_checkpoint reports them.
void unpack_row(BitWidth width, std::span<const std::uint8_t> packed,
                std::span<std::uint8_t> codes);

}  // namespace hqq

// The packed row layout of format 1 (docs/format.md).
#pragma once

#include <cstdint>
#include <span>

#include "hqq/bit_width.hpp"

namespace hqq {

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

#include "hqq/bitpack.hpp"

#include <cmath>
#include <sstream>

#include "hqq/core/codec.hpp"
#include "hqq/error.hpp"

namespace hqq {
namespace {

void check_sizes(BitWidth width, std::size_t codes, std::size_t packed) {
  const auto needed = packed_row_bytes(width, static_cast<std::int64_t>(codes));
  if (static_cast<std::int64_t>(packed) != needed) {
    throw_invalid("bitpack", "a row of " + std::to_string(codes) + " codes takes " +
                                 std::to_string(needed) + " bytes, not " + std::to_string(packed));
  }
}

}  // namespace

std::optional<BitWidth> bit_width_from_nbits(double nbits) {
  for (BitWidth width : kAllBitWidths) {
    // 1.58 also comes as a float32.
    if (std::abs(nbits_of(width) - nbits) < 1e-6) return width;
  }
  return std::nullopt;
}

std::string supported_nbits() {
  std::ostringstream text;
  for (const BitWidthInfo& info : kBitWidths) {
    text << (info.width == kBitWidths[0].width ? "" : ", ") << info.nbits;
  }
  return text.str();
}

std::int64_t packed_row_bytes(BitWidth width, std::int64_t cols) {
  return core::row_bytes(core::row_format(width), cols);
}

std::int64_t slice_alignment(BitWidth width) {
  const core::RowFormat format = core::row_format(width);
  return format.low_bits == 0 || format.high_bits > 0 ? format.block : 8 / format.low_bits;
}

void pack_row(BitWidth width, std::span<const std::uint8_t> codes, std::span<std::uint8_t> packed) {
  check_sizes(width, codes.size(), packed.size());
  core::pack_row(core::row_format(width), codes.data(), static_cast<std::int64_t>(codes.size()),
                 packed.data());
}

void unpack_row(BitWidth width, std::span<const std::uint8_t> packed,
                std::span<std::uint8_t> codes) {
  check_sizes(width, codes.size(), packed.size());
  core::unpack_row(core::row_format(width), packed.data(), static_cast<std::int64_t>(codes.size()),
                   codes.data());
}

}  // namespace hqq

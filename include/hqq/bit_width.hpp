// The bit widths of HQQ and how their codes are packed: the one table of them.
#pragma once

#include <array>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>

namespace hqq {

// In the order of kBitWidths. kTernary is what users write as nbits = 1.58: three levels.
enum class BitWidth : std::uint8_t { k8, k6, k5, k4, k3, k2, kTernary, k1 };

namespace core {

// A code is split into planes of primitive widths (8, 4, 2, 1 bits), low bits first. A row is a
// sequence of blocks of `block` codes; a block stores its planes one after the other.
struct RowFormat {
  int low_bits;   // first plane; 0: ternary
  int high_bits;  // second plane, 0: none
  int block;      // codes a block has; the last block of a row may be shorter
  int max_code;
};

}  // namespace core

struct BitWidthInfo {
  BitWidth width;
  double nbits;  // what users write
  core::RowFormat format;
};

// A new width is an enumerator above, a row here and the kernels that the compiler then asks for
// (docs/architecture.md, "A bit width").
inline constexpr BitWidthInfo kBitWidths[] = {
    {BitWidth::k8, 8, {8, 0, 8, 255}},         {BitWidth::k6, 6, {4, 2, 32, 63}},
    {BitWidth::k5, 5, {4, 1, 32, 31}},         {BitWidth::k4, 4, {4, 0, 8, 15}},
    {BitWidth::k3, 3, {2, 1, 32, 7}},          {BitWidth::k2, 2, {2, 0, 8, 3}},
    {BitWidth::kTernary, 1.58, {0, 0, 64, 2}}, {BitWidth::k1, 1, {1, 0, 8, 1}},
};
inline constexpr int kNumBitWidths = static_cast<int>(std::size(kBitWidths));

inline constexpr auto kAllBitWidths = [] {
  std::array<BitWidth, kNumBitWidths> widths{};
  for (int i = 0; i < kNumBitWidths; ++i) {
    widths[static_cast<std::size_t>(i)] = static_cast<BitWidth>(i);
  }
  return widths;
}();

static_assert(
    [] {
      for (int i = 0; i < kNumBitWidths; ++i) {
        if (static_cast<int>(kBitWidths[i].width) != i) return false;
      }
      return kNumBitWidths == static_cast<int>(BitWidth::k1) + 1;
    }(),
    "kBitWidths must have a row for every BitWidth, in the order of the enumeration");
static_assert(
    [] {
      for (const BitWidthInfo& info : kBitWidths) {
        const core::RowFormat& f = info.format;
        const int codes = f.low_bits == 0 ? 3 : 1 << (f.low_bits + f.high_bits);
        if (f.max_code != codes - 1) return false;
      }
      return true;
    }(),
    "max_code must fit the planes of its width");
static_assert(
    [] {
      const auto is_plane = [](int bits) {
        return bits == 1 || bits == 2 || bits == 4 || bits == 8;
      };
      for (const BitWidthInfo& info : kBitWidths) {
        const core::RowFormat& f = info.format;
        if (f.low_bits == 0 ? f.high_bits != 0 : !is_plane(f.low_bits)) return false;
        if (f.high_bits != 0 && !is_plane(f.high_bits)) return false;
      }
      return true;
    }(),
    "a width is ternary, or one or two planes of 8, 4, 2 or 1 bits: pack_plane() knows no other");

constexpr const BitWidthInfo& info_of(BitWidth width) {
  return kBitWidths[static_cast<int>(width)];
}

// 8, 6, 5, 4, 3, 2, 1.58 or 1, the number users write.
constexpr double nbits_of(BitWidth width) { return info_of(width).nbits; }
// The inverse; nullopt for any other number.
std::optional<BitWidth> bit_width_from_nbits(double nbits);
// "8, 6, 5, 4, 3, 2, 1.58, 1", for messages.
std::string supported_nbits();
// Largest code: 2^nbits - 1, and 2 for ternary.
constexpr int max_code(BitWidth width) { return info_of(width).format.max_code; }

namespace core {

// On the host: device code is given the format.
constexpr RowFormat row_format(BitWidth width) { return info_of(width).format; }

}  // namespace core
}  // namespace hqq

// Reading codes of tiles (tile.hpp) in the order of rows, eight at a time.
#pragma once

#include <cstdint>

#include "cuda/device/format/codes.hpp"
#include "cuda/device/format/tile.hpp"

namespace hqq::cuda::device {

// The two codes of lane 4 g + t in a pair of columns, in the two halves of a word. kLow: of the
// tile's low plane.
template <int kBits, int kLow>
__device__ inline std::uint32_t load_pair(const unsigned char* plane, const TiledRow& row, int pair,
                                          int t) {
  constexpr int kPairsPerWord = pairs_per_word(kBits), kChunk = chunk_words(kBits);
  const int word = row.fragment * kBits + pair / kPairsPerWord;
  const unsigned char* address =
      plane + chunk_offset(kBits, word / kChunk, 4 * row.g + t) + word % kChunk * 4;
  const std::uint32_t bits = ld_global(reinterpret_cast<const std::uint32_t*>(address));
  constexpr std::uint32_t kMask = 0x00010001u * ((1u << kBits) - 1);
  return bits >> field_bit(kBits, kLow, pair % kPairsPerWord, row.odd) & kMask;
}

// Codes [col, col + 8) of a row, one a byte; col is a multiple of 8. kSourceLow: as for
// load_codes(). Codes beyond the last column are 0.
template <int kSourceLow, int kHigh>
__device__ inline std::uint64_t load_tile_codes(const TiledRow& row, std::int64_t col) {
  constexpr int kLow = kSourceLow == 0 ? 2 : kSourceLow;
  const unsigned char* tile = row.tile + col / kTileCols * tile_bytes(kLow + kHigh);
  const int pair = static_cast<int>(col % kTileCols) / kOctet;
  std::uint64_t codes = 0;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    std::uint32_t two = load_pair<kLow, kLow>(tile, row, pair, t);
    if constexpr (kHigh > 0) {
      two |= load_pair<kHigh, kLow>(tile + tile_bytes(kLow), row, pair, t) << kLow;
    }
    codes |= static_cast<std::uint64_t>((two | two >> 8) & 0xFFFFu) << (16 * t);
  }
  return codes;
}

}  // namespace hqq::cuda::device

// Codes from format 1 to tiles and back.
#pragma once

#include <cstdint>

#include "cuda/device/format/codes.hpp"
#include "cuda/device/format/tiles.hpp"
#include "cuda/device/format/write_codes.hpp"

namespace hqq::cuda::device {

struct PackArgs {
  const std::uint8_t* W_q = nullptr;
  std::int64_t row_bytes = 0, cols = 0;
  RowOrder order;
  std::int64_t strips = 0, tiles = 0;  // tiles of a strip
  unsigned char* codes = nullptr;
};

// Words of one fragment, kBits of them, to a plane of a tile.
template <int kBits>
__device__ inline void store_plane(const std::uint32_t (&words)[kBits], unsigned char* plane,
                                   int lane, int fragment) {
  constexpr int kChunk = chunk_words(kBits);
  constexpr int kTogether = kBits < kChunk ? kBits : kChunk;
#pragma unroll
  for (int i = 0; i < kBits; i += kTogether) {
    const int word = fragment * kBits + i;
    unsigned char* out = plane + chunk_offset(kBits, word / kChunk, lane) + word % kChunk * 4;
    if constexpr (kTogether == 1) {
      st_global(reinterpret_cast<std::uint32_t*>(out), words[i]);
    } else if constexpr (kTogether == 2) {
      st_global(reinterpret_cast<uint2*>(out), make_uint2(words[i], words[i + 1]));
    } else {
      st_global(reinterpret_cast<uint4*>(out),
                make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]));
    }
  }
}

// A thread fills the words of one lane in one fragment of a tile. kSourceLow: as for load_codes().
template <int kSourceLow, int kHigh>
__global__ void pack_kernel(PackArgs args) {
  constexpr int kLow = kSourceLow == 0 ? 2 : kSourceLow;
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t tile = thread / (32 * kFragments);
  if (tile >= args.strips * args.tiles) return;
  const int fragment = static_cast<int>(thread / 32 % kFragments);
  const int lane = static_cast<int>(thread % 32), g = lane / 4, t = lane % 4;
  const std::int64_t first_place = tile / args.tiles * kTileRows + fragment * kFragmentRows;
  const std::int64_t first_col = tile % args.tiles * kTileCols;

  std::uint32_t low[kLow] = {};
  std::uint32_t high[kHigh > 0 ? kHigh : 1] = {};
#pragma unroll 1
  for (int odd = 0; odd < 2; ++odd) {
    const std::int64_t place = first_place + 8 * odd + g;
    if (place >= args.order.rows) continue;
    const std::uint8_t* row = args.W_q + args.order.row_at(place) * args.row_bytes;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const std::int64_t octet = first_col + pair * kOctet;
      if (octet >= args.cols) continue;
      const std::uint64_t codes = load_codes<kSourceLow, kHigh>(row, args.cols, octet);
      for (int half = 0; half < 2; ++half) {
        if (octet + 2 * t + half >= args.cols) continue;
        const auto code = static_cast<std::uint32_t>(codes >> (8 * (2 * t + half))) & 0xFFu;
        const int low_bit = field_bit(kLow, kLow, pair % pairs_per_word(kLow), odd);
        low[pair / pairs_per_word(kLow)] |= (code & ((1u << kLow) - 1)) << (16 * half + low_bit);
        if constexpr (kHigh > 0) {
          const int high_bit = field_bit(kHigh, kLow, pair % pairs_per_word(kHigh), odd);
          high[pair / pairs_per_word(kHigh)] |= code >> kLow << (16 * half + high_bit);
        }
      }
    }
  }
  unsigned char* out = args.codes + tile * tile_bytes(kLow + kHigh);
  store_plane<kLow>(low, out, lane, fragment);
  if constexpr (kHigh > 0) store_plane<kHigh>(high, out + tile_bytes(kLow), lane, fragment);
}

struct UnpackArgs {
  TiledRows from;
  PackedRows to;
};

// A thread fills a block of codes of a row.
template <int kSourceLow, int kHigh>
__global__ void unpack_kernel(UnpackArgs args) {
  const std::int64_t cols = args.from.cols, block = args.to.format.block;
  const std::int64_t blocks = (cols + block - 1) / block;
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= args.from.order.rows * blocks) return;
  const std::int64_t row = thread / blocks, first_col = thread % blocks * block;
  const TiledRow from = args.from.row(row, (kSourceLow == 0 ? 2 : kSourceLow) + kHigh);
  std::uint64_t octet = 0;
  int i = 0;
  const auto next = [&] {
    if (i % kOctet == 0) octet = load_tile_codes<kSourceLow, kHigh>(from, first_col + i);
    return static_cast<std::uint32_t>(octet >> (8 * (i++ % kOctet))) & 0xFFu;
  };
  const std::int64_t rest = cols - first_col;
  pack_block(args.to.format, rest < block ? rest : block, next, args.to.at(row, first_col));
}

}  // namespace hqq::cuda::device

// How the eight fields of a unit share bytes, for every number of bits: the one description that
// the kernels (fields-inl.hpp) and the reordering of codes (tile_order.cpp) follow. No function of
// the standard library is used here: kernels are compiled for instruction sets of their own.
#pragma once

#include "src/cpu/linear/tiles/tiles.hpp"

namespace hqq::cpu {

// Bits of a field that lie in bits which other fields leave unused: bits [from, from + count) of
// the bytes of vector `vector` are bits [to, to + count) of field `field`.
struct Piece {
  int field, vector, from, count, to;
};

// `slots` fields of `bits` bits lie in each of the `bits` vectors of a unit, the first in the
// lowest bits; pieces make up the fields that are left.
struct FieldPacking {
  int bits;
  int slots;
  int num_pieces;
  Piece pieces[7];
};

inline constexpr FieldPacking kFieldPackings[] = {
    {8, 1, 0, {}},
    {6,
     1,
     6,
     {{6, 0, 6, 2, 0},
      {6, 1, 6, 2, 2},
      {6, 2, 6, 2, 4},
      {7, 3, 6, 2, 0},
      {7, 4, 6, 2, 2},
      {7, 5, 6, 2, 4}}},
    {5,
     1,
     7,
     {{5, 0, 5, 3, 0},
      {5, 3, 5, 2, 3},
      {6, 1, 5, 3, 0},
      {6, 4, 5, 2, 3},
      {7, 2, 5, 3, 0},
      {7, 3, 7, 1, 3},
      {7, 4, 7, 1, 4}}},
    {4, 2, 0, {}},
    {3, 2, 4, {{6, 0, 6, 2, 0}, {6, 2, 6, 1, 2}, {7, 1, 6, 2, 0}, {7, 2, 7, 1, 2}}},
    {2, 4, 0, {}},
    {1, 8, 0, {}},
};
inline constexpr int kNumFieldPackings = sizeof(kFieldPackings) / sizeof(kFieldPackings[0]);

// The row for a number of bits, or -1.
constexpr int field_packing_index(int bits) {
  for (int i = 0; i < kNumFieldPackings; ++i) {
    if (kFieldPackings[i].bits == bits) return i;
  }
  return -1;
}

constexpr const FieldPacking& field_packing(int bits) {
  return kFieldPackings[field_packing_index(bits)];
}

}  // namespace hqq::cpu

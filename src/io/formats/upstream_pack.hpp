// How upstream hqq 0.2.x packs codes (docs/format.md, "Upstream format").
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "hqq/bitpack.hpp"
#include "hqq/tensor.hpp"

namespace hqq {

// Upstream reshapes a matrix to a grid [rows, cols] of codes ([group_size, groups] for axis 0,
// [groups, group_size] for axis 1), cuts the grid along its rows into `fields` slabs of equal size
// and puts the slabs into the bit fields of a word, the first slab into the highest field.
struct UpstreamPacking {
  const char* name;
  int bits;    // a field has
  int fields;  // a word has
  DType word;  // kU8 or kI32

  // Rows of the packed grid. Only the 3-bit packing fills up the last slab.
  std::int64_t packed_rows(std::int64_t rows) const { return (rows + fields - 1) / fields; }
  bool pads() const { return word == DType::kI32; }
};

const UpstreamPacking& upstream_packing(BitWidth width);
// "8bit_u8", "4bit_u8", "3bit_32", "2bit_u8", "1bit_u8"; nullptr for any other name.
const UpstreamPacking* find_upstream_packing(std::string_view name);

// Between the rows of format 1 and upstream's words. The reshape of a matrix keeps its row-major
// order, so all that counts is the number of words, one for each element of a slab. Tensors have
// their sizes: `rows` uint8 [out_features, packed_row_bytes], `words` any dtype with bytes for all
// words.
void pack_upstream(BitWidth width, const Tensor& rows, std::int64_t in_features, Tensor& words);
// Throws FormatError("[where] ...") for a code above max_code(width) and for bits that belong to no
// code and are not 0, since format 1 could not give them back.
void unpack_upstream(BitWidth width, const Tensor& words, std::int64_t in_features, Tensor& rows,
                     const std::string& where);

}  // namespace hqq

#include "src/io/formats/upstream_pack.hpp"

#include <algorithm>
#include <cstring>
#include <span>
#include <vector>

#include "hqq/bitpack.hpp"
#include "hqq/error.hpp"

namespace hqq {
namespace {

constexpr UpstreamPacking kPackings[] = {{"8bit_u8", 8, 1, DType::kU8},
                                         {"4bit_u8", 4, 2, DType::kU8},
                                         {"3bit_32", 3, 10, DType::kI32},
                                         {"2bit_u8", 2, 4, DType::kU8},
                                         {"1bit_u8", 1, 8, DType::kU8}};

template <class Word>
void put(const std::uint8_t* codes, std::int64_t count, int shift, Word* words) {
  for (std::int64_t i = 0; i < count; ++i) {
    words[i] = static_cast<Word>(words[i] | static_cast<Word>(codes[i]) << shift);
  }
}

template <class Word>
void take(const Word* words, std::int64_t count, int shift, int bits, std::uint8_t* codes) {
  const Word mask = static_cast<Word>((1u << bits) - 1);
  for (std::int64_t i = 0; i < count; ++i) {
    codes[i] = static_cast<std::uint8_t>((words[i] >> shift) & mask);
  }
}

// The part of a row inside one slab.
struct Piece {
  std::int64_t begin;  // in the row
  std::int64_t count;
  std::int64_t word;  // the first one
  int shift;
};

// The pieces of the codes at the flat positions [first, first + count).
std::vector<Piece> pieces_of(const UpstreamPacking& packing, std::int64_t words, std::int64_t first,
                             std::int64_t count) {
  std::vector<Piece> pieces;
  for (std::int64_t done = 0; done < count;) {
    const std::int64_t slab = (first + done) / words;
    const std::int64_t word = (first + done) % words;
    const std::int64_t length = std::min(count - done, words - word);
    const int shift = packing.bits * (packing.fields - 1 - static_cast<int>(slab));
    pieces.push_back({done, length, word, shift});
    done += length;
  }
  return pieces;
}

std::int64_t word_count(const UpstreamPacking& packing, const Tensor& words) {
  return static_cast<std::int64_t>(words.nbytes() / dtype_size(packing.word));
}

template <class Word>
void pack_rows(BitWidth width, const Tensor& rows, std::int64_t in_features, Tensor& words) {
  const UpstreamPacking& packing = upstream_packing(width);
  const std::int64_t count = word_count(packing, words);
  const std::int64_t row_bytes = packed_row_bytes(width, in_features);
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(in_features));
  std::memset(words.buffer.data, 0, words.nbytes());
  for (std::int64_t row = 0; row < rows.shape[0]; ++row) {
    unpack_row(width,
               {rows.data<std::uint8_t>() + row * row_bytes, static_cast<std::size_t>(row_bytes)},
               codes);
    for (const Piece& piece : pieces_of(packing, count, row * in_features, in_features)) {
      put(codes.data() + piece.begin, piece.count, piece.shift, words.data<Word>() + piece.word);
    }
  }
}

template <class Word>
void unpack_rows(BitWidth width, const Tensor& words, std::int64_t in_features, Tensor& rows,
                 const std::string& where) {
  const UpstreamPacking& packing = upstream_packing(width);
  const std::int64_t count = word_count(packing, words);
  const std::int64_t row_bytes = packed_row_bytes(width, in_features);
  const int top = max_code(width);
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(in_features));
  for (std::int64_t row = 0; row < rows.shape[0]; ++row) {
    for (const Piece& piece : pieces_of(packing, count, row * in_features, in_features)) {
      take(words.data<Word>() + piece.word, piece.count, piece.shift, packing.bits,
           codes.data() + piece.begin);
    }
    const auto largest = std::max_element(codes.begin(), codes.end());
    if (*largest > top) {
      throw_format(where, "W_q has the code " + std::to_string(*largest) + " for the weight [" +
                              std::to_string(row) + ", " + std::to_string(largest - codes.begin()) +
                              "]; the largest is " + std::to_string(top));
    }
    pack_row(width, codes,
             {rows.data<std::uint8_t>() + row * row_bytes, static_cast<std::size_t>(row_bytes)});
  }
}

// Fields after the last code, and the two highest bits of a 3-bit word.
void check_unused_bits(const Tensor& words, std::int64_t numel, const std::string& where) {
  const UpstreamPacking& packing = upstream_packing(BitWidth::k3);
  const std::int64_t count = word_count(packing, words);
  const auto* values = words.data<std::uint32_t>();
  const std::uint32_t used = (1u << (packing.bits * packing.fields)) - 1;
  for (std::int64_t i = 0; i < count; ++i) {
    // Field k holds the flat position k * count + i.
    const std::int64_t fields = i < numel ? (numel - i + count - 1) / count : 0;
    const int empty = packing.bits * (packing.fields - static_cast<int>(fields));
    const std::uint32_t padding = (1u << empty) - 1;
    if ((values[i] & ~used) != 0 || (values[i] & padding) != 0) {
      throw_format(where, "word " + std::to_string(i) +
                              " of W_q has bits set that belong to no weight; they must be 0");
    }
  }
}

}  // namespace

const UpstreamPacking& upstream_packing(BitWidth width) {
  switch (width) {
    case BitWidth::k4:
      return kPackings[1];
    case BitWidth::k3:
      return kPackings[2];
    case BitWidth::k2:
    case BitWidth::kTernary:
      return kPackings[3];
    case BitWidth::k1:
      return kPackings[4];
    default:  // 8, 6 and 5 bits take a byte
      return kPackings[0];
  }
}

const UpstreamPacking* find_upstream_packing(std::string_view name) {
  for (const UpstreamPacking& packing : kPackings) {
    if (name == packing.name) return &packing;
  }
  return nullptr;
}

void pack_upstream(BitWidth width, const Tensor& rows, std::int64_t in_features, Tensor& words) {
  if (upstream_packing(width).word == DType::kI32) {
    pack_rows<std::uint32_t>(width, rows, in_features, words);
  } else {
    pack_rows<std::uint8_t>(width, rows, in_features, words);
  }
}

void unpack_upstream(BitWidth width, const Tensor& words, std::int64_t in_features, Tensor& rows,
                     const std::string& where) {
  if (upstream_packing(width).word == DType::kI32) {
    check_unused_bits(words, rows.shape[0] * in_features, where);
    unpack_rows<std::uint32_t>(width, words, in_features, rows, where);
  } else {
    unpack_rows<std::uint8_t>(width, words, in_features, rows, where);
  }
}

}  // namespace hqq

// Codes from stored scale and zero, packed into rows of format 1.
#pragma once

#include <cstdint>

#include "cuda/device/weights.hpp"
#include "hqq/core/codec.hpp"
#include "hqq/core/solver.hpp"

namespace hqq::cuda::device {

// What turns the weights of one group into codes.
struct Encoder {
  float inv_scale, zero, max_code;
  __device__ std::uint32_t operator()(float weight) const {
    return static_cast<std::uint32_t>(
        core::scalar::encode<float>(weight, inv_scale, zero, max_code));
  }
};

// The low `bytes` (1, 2, 4 or 8, or fewer at the end of a row) of a word. Rows may begin at any
// address.
__device__ inline void store_packed(std::uint64_t word, std::int64_t bytes, std::uint8_t* out) {
  const auto address = reinterpret_cast<std::uintptr_t>(out);
  if (bytes == 8 && address % 8 == 0) {
    return st_global(reinterpret_cast<std::uint64_t*>(out), word);
  }
  if (bytes == 4 && address % 4 == 0) {
    return st_global(reinterpret_cast<std::uint32_t*>(out), static_cast<std::uint32_t>(word));
  }
  for (std::int64_t i = 0; i < bytes; ++i) {
    st_global(out + i, static_cast<std::uint8_t>(word >> (8 * i)));
  }
}

// Up to eight codes, one a byte, as part of a plane of `bits` bits.
__device__ inline void store_plane(int bits, std::uint64_t codes, std::int64_t n,
                                   std::uint8_t* out) {
  codes &= core::byte_mask(bits);
  std::uint64_t word = codes;
  if (bits == 4) word = core::gather_bits<4>(codes);
  if (bits == 2) word = core::gather_bits<2>(codes);
  if (bits == 1) word = core::gather_bits<1>(codes);
  store_packed(word, core::plane_bytes(bits, n), out);
}

// Packs one block of n codes, which next() returns one after the other.
template <class Next>
__device__ inline void pack_block(core::RowFormat format, std::int64_t n, Next& next,
                                  std::uint8_t* out) {
  if (format.low_bits == 0) {
    for (std::int64_t i = 0; i < n; i += core::kTernaryDigits) {
      const std::int64_t count = n - i < core::kTernaryDigits ? n - i : core::kTernaryDigits;
      std::uint32_t value = 0;
      std::uint32_t power = 1;
      for (std::int64_t d = 0; d < count; ++d, power *= 3) value += next() * power;
      st_global(out++, static_cast<std::uint8_t>(value));
    }
    return;
  }
  std::uint8_t* high = out + core::plane_bytes(format.low_bits, n);
  for (std::int64_t i = 0; i < n; i += 8) {
    const std::int64_t count = n - i < 8 ? n - i : 8;
    std::uint64_t codes = 0;
    for (std::int64_t d = 0; d < count; ++d) codes |= std::uint64_t{next()} << (8 * d);
    store_plane(format.low_bits, codes, count, out);
    out += format.low_bits;
    if (format.high_bits == 0) continue;
    store_plane(format.high_bits, codes >> format.low_bits, count, high);
    high += format.high_bits;
  }
}

// Where codes go.
struct PackedRows {
  std::uint8_t* W_q = nullptr;
  std::int64_t row_bytes = 0;
  core::RowFormat format{};
  // `col` is a multiple of format.block.
  __device__ std::uint8_t* at(std::int64_t row, std::int64_t col) const {
    return W_q + row * row_bytes + col / format.block * core::block_bytes(format, format.block);
  }
};

// Encodes one group that begins at `col`, a multiple of format.block, and ends at one or at the end
// of the row.
template <class Weights>
__device__ inline void encode_group(const PackedRows& out, std::int64_t row, std::int64_t col,
                                    std::int64_t n, const Weights& weights, const Encoder& encode) {
  std::int64_t i = 0;
  const auto next = [&] { return encode(weights(i++)); };
  for (std::int64_t begin = 0; begin < n; begin += out.format.block) {
    const std::int64_t rest = n - begin;
    pack_block(out.format, rest < out.format.block ? rest : out.format.block, next,
               out.at(row, col + begin));
  }
}

struct EncodeArgs {
  WeightSource source;
  core::GroupLayout layout;
  Metadata scale, zero;
  PackedRows out;
  QuantizeProblems* problems = nullptr;
};

// Encodes the weights of a row one after the other, whatever groups they are in.
class RowEncoder {
 public:
  __device__ RowEncoder(const EncodeArgs& args, std::int64_t row, std::int64_t col)
      : args_(args), groups_(args.layout.num_groups()), row_(row), col_(col) {
    const core::GroupLayout& layout = args.layout;
    if (layout.axis == 1) {
      group_ = row * layout.groups_per_row() + col / layout.group_size;
      run_ = layout.group_size;
      left_ = run_ - col % run_;
    } else {
      group_ = (row * layout.cols + col) % groups_;
      run_ = left_ = 1;
    }
    read_group();
  }
  __device__ std::uint32_t operator()() {
    if (left_ == 0) next_group();
    --left_;
    const float raw = raw_weight(args_.source, row_, col_);
    check_weight(args_.problems, raw, row_ * args_.layout.cols + col_);
    const float weight = balanced(args_.source, raw, col_);
    ++col_;
    return encode_(weight);
  }

 private:
  __device__ void next_group() {
    ++group_;
    if (group_ == groups_) group_ = 0;  // axis 0 begins again
    left_ = run_;
    read_group();
  }
  __device__ void read_group() {
    encode_ = {1.0f / args_.scale(group_), args_.zero(group_),
               static_cast<float>(args_.out.format.max_code)};
  }

  const EncodeArgs& args_;
  std::int64_t groups_;
  std::int64_t row_, col_;
  std::int64_t group_;
  std::int64_t run_, left_;  // neighbours in one group, and those that are still to come
  Encoder encode_;
};

// A thread a block of codes; also checks the weights.
static __global__ void encode_kernel(EncodeArgs args) {
  const std::int64_t block = args.out.format.block;
  const std::int64_t per_row = (args.layout.cols + block - 1) / block;
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= args.layout.rows * per_row) return;
  const std::int64_t row = thread / per_row;
  const std::int64_t col = thread % per_row * block;
  const std::int64_t rest = args.layout.cols - col;
  RowEncoder next(args, row, col);
  pack_block(args.out.format, rest < block ? rest : block, next, args.out.at(row, col));
}

}  // namespace hqq::cuda::device

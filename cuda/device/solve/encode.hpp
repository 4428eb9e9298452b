// Codes from stored scale and zero, packed into rows of format 1.
#pragma once

#include <cstdint>

#include "cuda/device/format/write_codes.hpp"
#include "cuda/device/solve/weights.hpp"
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

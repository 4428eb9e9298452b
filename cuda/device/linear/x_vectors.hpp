// x in shared memory, for decode_kernel.
#pragma once

#include <cstdint>

#include "cuda/device/format/metadata.hpp"
#include "cuda/device/linear/launch_shape.hpp"
#include "cuda/device/linear/params.hpp"
#include "cuda/device/simt/simt.hpp"

namespace hqq::cuda::device {

// x in shared memory, of the tokens and of the columns from `first_col` on, zeros beyond the last
// column. One more row holds zeros: all tokens that there are not. A thread's share is every
// blockDim.x-th vector of eight columns.
template <int kTokens>
class XVectors {
 public:
  static constexpr int kVector = 8;

  __device__ XVectors(const LinearParams& p, std::int64_t first_token, int tokens, int first_col,
                      int columns)
      : p_(p),
        x_(p.x + first_token * p.x_stride),
        tokens_(tokens),
        rows_(tokens < kTokens ? tokens + 1 : kTokens),
        first_col_(first_col),
        columns_(columns) {
    const int vectors = columns / kVector;
    const auto thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    row_ = thread / vectors;
    at_ = (thread - row_ * vectors) * kVector;
    row_step_ = threads / vectors;
    at_step_ = (threads - row_step_ * vectors) * kVector;
  }

  __device__ bool done() const { return row_ >= rows_; }
  __device__ void advance() {
    row_ += row_step_;
    at_ += at_step_;
    if (at_ < columns_) return;
    at_ -= columns_;
    ++row_;
  }
  __device__ int col() const { return first_col_ + at_; }
  __device__ bool has_token() const { return row_ < tokens_; }
  // Only where has_token().
  __device__ const std::uint16_t* from() const { return x_ + row_ * p_.x_stride + col(); }
  __device__ std::uint16_t* to(std::uint16_t* shared_x) const {
    return shared_x + row_ * decode_x_stride(columns_) + at_;
  }
  // All vectors lie in x or behind it. Starts the copies.
  __device__ void request_all(std::uint16_t* shared_x) {
    for (; !done(); advance()) {
      const bool inside = has_token() && col() < p_.K;
      simt::cp_async_16(to(shared_x), inside ? from() : x_, inside);
    }
  }
  __device__ uint4 load() const {
    if (done() || !has_token()) return make_uint4(0, 0, 0, 0);
    if (p_.x_aligned && col() + kVector <= p_.K) {
      return ld_global(reinterpret_cast<const uint4*>(from()));
    }
    std::uint32_t v[kVector / 2] = {};
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (col() + j < p_.K) {
        v[j / 2] |= static_cast<std::uint32_t>(ld_global(from() + j)) << (16 * (j % 2));
      }
    }
    return make_uint4(v[0], v[1], v[2], v[3]);
  }

 private:
  const LinearParams& p_;
  const std::uint16_t* x_;
  int tokens_, rows_, first_col_, columns_;
  int row_, at_, row_step_, at_step_;
};

// The factors of eight columns from `col` on, 0 beyond the last.
__device__ inline void load_col_scale(const LinearParams& p, const unsigned char* col_scale,
                                      int col, float (&scale)[8]) {
  const bool half = p.col_scale_type == DType::kF16 || p.col_scale_type == DType::kBF16;
  const auto* halves = reinterpret_cast<const std::uint16_t*>(col_scale) + col;
  if (half && col + 8 <= p.K && reinterpret_cast<std::uintptr_t>(halves) % 16 == 0) {
    const uint4 v = ld_global(reinterpret_cast<const uint4*>(halves));
    const std::uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      scale[j] = half_value(p.col_scale_type, words[j / 2] >> (16 * (j % 2)));
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    scale[j] = col + j < p.K ? load_float(p.col_scale_type, col_scale, col + j) : 0.0f;
  }
}

// v times the factors of its columns, rounded.
template <class T>
__device__ inline uint4 times_col_scale(const LinearParams& p, const unsigned char* col_scale,
                                        int col, uint4 v) {
  float scale[8];
  load_col_scale(p, col_scale, col, scale);
  const auto scaled = [&](std::uint32_t pair, int j) {
    return simt::pack2<T>(T::to_float(static_cast<std::uint16_t>(pair)) * scale[j],
                          T::to_float(static_cast<std::uint16_t>(pair >> 16)) * scale[j + 1]);
  };
  return make_uint4(scaled(v.x, 0), scaled(v.y, 2), scaled(v.z, 4), scaled(v.w, 6));
}

// With registers in between, four vectors at a time.
template <class T, int kTokens>
__device__ inline void load_x(const LinearParams& p, const unsigned char* col_scale,
                              XVectors<kTokens> vectors, std::uint16_t* shared_x) {
  constexpr int kAhead = 4;
  while (!vectors.done()) {
    XVectors<kTokens> ahead = vectors;
    uint4 v[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      v[i] = ahead.load();
      ahead.advance();
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (vectors.done()) return;
      if (col_scale != nullptr) v[i] = times_col_scale<T>(p, col_scale, vectors.col(), v[i]);
      st_shared(reinterpret_cast<uint4*>(vectors.to(shared_x)), v[i]);
      vectors.advance();
    }
  }
}

}  // namespace hqq::cuda::device

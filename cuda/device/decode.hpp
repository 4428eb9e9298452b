// y = x W_r^T for few rows of x: all x of a block's columns in shared memory, every warp on its own
// strip of 32 rows (or share of the columns), weights straight from memory through a ring.
#pragma once

#include "cuda/device/linear.hpp"

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

// v times the scales of its columns, rounded.
template <class T>
__device__ inline uint4 times_col_scale(const LinearParams& p, const float* col_scale, int col,
                                        uint4 v) {
  constexpr int kVector = 8;
  float scale[kVector];
  if (col + kVector <= p.K && reinterpret_cast<std::uintptr_t>(col_scale) % 16 == 0) {
#pragma unroll
    for (int j = 0; j < kVector; j += 4) {
      const float4 s = ld_global(reinterpret_cast<const float4*>(col_scale + col + j));
      scale[j] = s.x, scale[j + 1] = s.y, scale[j + 2] = s.z, scale[j + 3] = s.w;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      scale[j] = col + j < p.K ? ld_global(col_scale + col + j) : 0.0f;
    }
  }
  const auto scaled = [&](std::uint32_t pair, int j) {
    return simt::pack2<T>(T::to_float(static_cast<std::uint16_t>(pair)) * scale[j],
                          T::to_float(static_cast<std::uint16_t>(pair >> 16)) * scale[j + 1]);
  };
  return make_uint4(scaled(v.x, 0), scaled(v.y, 2), scaled(v.z, 4), scaled(v.w, 6));
}

// With registers in between, four vectors at a time.
template <class T, int kTokens>
__device__ inline void load_x(const LinearParams& p, const float* col_scale,
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

// One warp's sums: its strip times up to 8 kTokenTiles tokens.
template <class T, int kLow, int kHigh, Scaling kScaling, int kTokenTiles>
class DecodeSums {
 public:
  using LaneCodes = Codes<T, kLow, kHigh>;
  static constexpr int kUnit = unit_tiles(kLow + kHigh);
  using Stream = WeightStream<kLow + kHigh, kScaling, kUnit, kDecodeRing>;

  __device__ DecodeSums(const LinearParams& p, int first_tile, int tokens, int x_stride)
      : p_(p), lane_(static_cast<int>(threadIdx.x % 32)) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      const int token = 8 * j + lane_ % 8;
      x_place_[j] = (token < tokens ? token : tokens) * x_stride + lane_ / 8 * 8;
    }
    if constexpr (kScaling == Scaling::kSums) {
      const int step = first_tile * kSteps;
      const int size = static_cast<int>(p.group_steps.divisor);
      steps_left_ = size - (step - p.group_steps(step) * size);
    }
  }

  // The tiles of a stage; `x`: token 0 at the first column of the stage.
  __device__ __forceinline__ void add_stage(const Stream& stream, const std::uint16_t* x) {
    const unsigned char* group = stream.metadata();
    const int count = stream.tiles();
    for (int tile = 0; tile < count; ++tile) {
      LaneCodes codes;
      codes.load(stream.codes() + tile * tile_bytes(LaneCodes::kBits), lane_);
      std::uint32_t b[kTokenTiles][kSteps][2];
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
        for (int s = 0; s < kSteps; s += 2) {
          std::uint32_t r[4];
          simt::ldmatrix_x4(r, x + x_place_[j] + tile * kTileCols + s * kStepCols);
          b[j][s][0] = r[0], b[j][s][1] = r[1];
          b[j][s + 1][0] = r[2], b[j][s + 1][1] = r[3];
        }
      }
      if constexpr (kScaling == Scaling::kSums) {
        step<0>(codes, b, group);
        step<1>(codes, b, group);
        step<2>(codes, b, group);
        step<3>(codes, b, group);
      } else {
        const unsigned char* values = stream.metadata() + tile * kTileMetadataBytes;
        column_step<0>(codes, b, values);
        column_step<1>(codes, b, values);
        __syncwarp();  // or the compiler holds the scales of all steps, in too many registers
        column_step<2>(codes, b, values);
        column_step<3>(codes, b, values);
      }
    }
    // A group that goes on has its scale in the next stage as well; a share of columns that ends
    // inside a group needs it now.
    if constexpr (kScaling == Scaling::kSums) {
      if (stream.last() && steps_left_ != static_cast<int>(p_.group_steps.divisor)) {
        apply_scale(group);
      }
    }
  }

  __device__ __forceinline__ void store(float* sums, int stride, int strip_row) const {
    store_strip(y_, lane_, sums, stride, strip_row);
  }

 private:
  // Sums of codes times x, and of x alone by a matrix of ones.
  template <int kStep>
  __device__ __forceinline__ void step(const LaneCodes& codes,
                                       const std::uint32_t (&b)[kTokenTiles][kSteps][2],
                                       const unsigned char*& group) {
    std::uint32_t a0[4], a1[4];
    codes.template raw<0, kStep>(a0);
    codes.template raw<1, kStep>(a1);
    const std::uint32_t ones[4] = {Half<T>::kOnes, Half<T>::kOnes, Half<T>::kOnes, Half<T>::kOnes};
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      simt::mma_m16n8k16<T>(dot_[0][j], a0, b[j][kStep]);
      simt::mma_m16n8k16<T>(dot_[1][j], a1, b[j][kStep]);
      simt::mma_m16n8k16<T>(x_sum_[j], ones, b[j][kStep]);
    }
    // Only groups of whole tiles can do without a look at every step.
    const auto size = static_cast<int>(p_.group_steps.divisor);
    const bool whole_tiles = size % kSteps == 0;
    if (kStep + 1 < kSteps && whole_tiles) return;
    steps_left_ -= whole_tiles ? kSteps : 1;
    if (steps_left_ > 0) return;
    apply_scale(group);
    group += row_metadata_bytes(p_.float_metadata ? 4 : 2);
    steps_left_ = size;
  }

  // y += scale (dot - zero x_sum), in terms of what raw() makes of codes.
  __device__ __forceinline__ void apply_scale(const unsigned char* group) {
    constexpr float kUnit = LaneCodes::kUnit;
    constexpr float kOddUnit = kUnit * (1 << LaneCodes::kOddShift);
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const RowPair rows = row_pair(p_, group, f, lane_ / 4);
      const float scale[2] = {rows.scale[0] * (1.0f / kUnit), rows.scale[1] * (1.0f / kOddUnit)};
      const float minus_zero[2] = {-::fmaf(rows.zero[0], kUnit, LaneCodes::kOffset),
                                   -::fmaf(rows.zero[1], kOddUnit, LaneCodes::kOffset)};
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float centered = ::fmaf(minus_zero[i / 2], x_sum_[j][i % 2], dot_[f][j][i]);
          y_[f][j][i] = ::fmaf(scale[i / 2], centered, y_[f][j][i]);
          dot_[f][j][i] = 0.0f;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x_sum_[j][i] = 0.0f;
    }
  }

  template <int kStep>
  __device__ __forceinline__ void column_step(const LaneCodes& codes,
                                              const std::uint32_t (&b)[kTokenTiles][kSteps][2],
                                              const unsigned char* values) {
    constexpr int kFragmentBytes = kUnit * kTileMetadataBytes;
    std::uint32_t a[kFragments][4];
    ColumnScales<LaneCodes> scales;
    scales.load(values + kStep * kStepMetadataBytes, lane_ % 4);
    codes.template centered<0, kStep>(a[0], scales.minus_part);
    scales.template apply<T>(a[0]);
    scales.load(values + kFragmentBytes + kStep * kStepMetadataBytes, lane_ % 4);
    codes.template centered<1, kStep>(a[1], scales.minus_part);
    scales.template apply<T>(a[1]);
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      simt::mma_m16n8k16<T>(y_[0][j], a[0], b[j][kStep]);
      simt::mma_m16n8k16<T>(y_[1][j], a[1], b[j][kStep]);
    }
  }

  const LinearParams& p_;
  int lane_;
  int x_place_[kTokenTiles];  // of the row and the eight columns that the lane names to ldmatrix
  int steps_left_ = 0;        // of the group
  float y_[kFragments][kTokenTiles][4] = {};
  float dot_[kFragments][kTokenTiles][4] = {};
  float x_sum_[kTokenTiles][4] = {};
};

template <class T, int kLow, int kHigh, Scaling kScaling, int kTokenTiles>
__global__ void __launch_bounds__(kDecodeThreads, 2) decode_kernel(LinearParams p) {
  using Sums = DecodeSums<T, kLow, kHigh, kScaling, kTokenTiles>;
  using Stream = typename Sums::Stream;
  constexpr int kTokens = 8 * kTokenTiles;
  const int expert = static_cast<int>(blockIdx.z);
  const Tokens all = tokens_of(p, expert);
  const std::int64_t first = all.begin + static_cast<std::int64_t>(blockIdx.y) * kTokens;
  if (first >= all.end) return;

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int split = static_cast<int>(blockIdx.x) % p.splits;
  const int first_strip = static_cast<int>(blockIdx.x) / p.splits * p.strips_per_block;
  // The block's tiles, and this warp's.
  const int parts = kDecodeWarps / p.strips_per_block;
  const int part = warp / p.strips_per_block, strip_in_block = warp % p.strips_per_block;
  const int block_begin = split * p.tiles_per_split;
  const int block_end =
      block_begin + p.tiles_per_split < p.tiles ? block_begin + p.tiles_per_split : p.tiles;
  constexpr int kUnit = Sums::kUnit;
  const int share = (block_end - block_begin + parts * kUnit - 1) / (parts * kUnit) * kUnit;
  const int begin = block_begin + part * share < block_end ? block_begin + part * share : block_end;
  int end = begin + share < block_end ? begin + share : block_end;
  if (first_strip + strip_in_block >= p.strips) end = begin;

  unsigned char* shared = simt::shared_memory();
  auto* x = reinterpret_cast<std::uint16_t*>(shared + kCounterShared);
  unsigned char* ring =
      shared + p.ring_offset + warp * kDecodeRing * (Stream::kCodesBytes + p.slot_bytes);
  const float* col_scale =
      p.col_scale == nullptr
          ? nullptr
          : reinterpret_cast<const float*>(reinterpret_cast<const unsigned char*>(p.col_scale) +
                                           expert * p.col_scale_stride);
  const int columns = (block_end - block_begin) * kTileCols;
  const int x_stride = decode_x_stride(columns);
  const bool copies_x =
      p.x_aligned && col_scale == nullptr && p.K % XVectors<kTokens>::kVector == 0;

  for (std::int64_t token = first; token < all.end;
       token += static_cast<std::int64_t>(gridDim.y) * kTokens) {
    const int tokens = all.end - token < kTokens ? static_cast<int>(all.end - token) : kTokens;
    XVectors<kTokens> vectors(p, token, tokens, block_begin * kTileCols, columns);
    if (copies_x) vectors.request_all(x);
    simt::cp_async_commit();
    Stream stream(p, expert, first_strip + strip_in_block, begin, end, ring);
#pragma unroll
    for (int i = 0; i < kDecodeRing - 1; ++i) {
      stream.request_next();
      simt::cp_async_commit();
    }
    if (!copies_x) load_x<T>(p, col_scale, vectors, x);
    simt::cp_async_wait<kDecodeRing - 1>();  // for x only
    __syncthreads();

    Sums sums(p, begin, tokens, x_stride);
    for (; !stream.done(); stream.advance()) {
      simt::cp_async_wait<kDecodeRing - 2>();
      __syncwarp();
      stream.request_next();  // to the place of the stage before this one
      simt::cp_async_commit();
      sums.add_stage(stream, x + (stream.tile() - block_begin) * kTileCols);
    }
    __syncthreads();  // x has been read; its place is that of the sums
    auto* block_sums = reinterpret_cast<float*>(x);
    const int stride = sums_stride(p.strips_per_block * kTileRows);
    sums.store(block_sums + part * kTokens * stride, stride, strip_in_block * kTileRows);
    finish<T>(p, block_sums, {parts, kTokens, first_strip * kTileRows, token, tokens}, expert,
              split);
    __syncthreads();
  }
}

}  // namespace hqq::cuda::device

// y = x W_r^T for few rows of x: all x of a block's columns in shared memory, every warp on its own
// strip of 32 rows (or share of the columns), weights straight from memory through a ring.
#pragma once

#include "cuda/device/linear/code_stream.hpp"
#include "cuda/device/linear/column_scales.hpp"
#include "cuda/device/linear/finish.hpp"
#include "cuda/device/linear/fragments.hpp"
#include "cuda/device/linear/row_scales.hpp"
#include "cuda/device/linear/scale_stream.hpp"
#include "cuda/device/linear/store_strip.hpp"
#include "cuda/device/linear/tokens.hpp"
#include "cuda/device/linear/x_vectors.hpp"

namespace hqq::cuda::device {

// One warp's sums: its strip times up to 8 kTokenTiles tokens.
template <class T, int kLow, int kHigh, Scaling kScaling, int kTokenTiles>
class DecodeSums {
 public:
  using LaneCodes = Codes<T, kLow, kHigh>;
  static constexpr int kUnit = unit_tiles(kLow + kHigh);
  using Stream = CodeStream<kLow + kHigh, kUnit, kDecodeRing>;
  using Scales = ScaleStream<T, kLow + kHigh, kScaling>;

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
      group_ = p.group_steps(step);
      steps_left_ = size - (step - group_ * size);
    }
  }

  // The tiles of a stage; `x`: token 0 at the first column of the stage.
  __device__ __forceinline__ void add_stage(const Stream& stream, Scales& scales,
                                            const std::uint16_t* x) {
    const int count = stream.tiles();
    if constexpr (kScaling == Scaling::kSums) scales.require(stream.tile(), count);
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
        step<0>(codes, b, scales);
        step<1>(codes, b, scales);
        step<2>(codes, b, scales);
        step<3>(codes, b, scales);
      } else {
        scales.advance();
        column_step<0>(codes, b, scales);
        column_step<1>(codes, b, scales);
        __syncwarp();  // or the compiler holds the scales of all steps, in too many registers
        column_step<2>(codes, b, scales);
        column_step<3>(codes, b, scales);
      }
    }
    // A share of columns may end inside a group.
    if constexpr (kScaling == Scaling::kSums) {
      if (stream.last() && steps_left_ != static_cast<int>(p_.group_steps.divisor)) {
        apply_scale(scales);
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
                                       const Scales& scales) {
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
    apply_scale(scales);
    ++group_;
    steps_left_ = size;
  }

  // y += scale (dot - zero x_sum), in terms of what raw() makes of codes.
  __device__ __forceinline__ void apply_scale(const Scales& scales) {
    constexpr float kUnit = LaneCodes::kUnit;
    constexpr float kOddUnit = kUnit * (1 << LaneCodes::kOddShift);
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const RowPair rows = scales.rows(group_, f, lane_ / 4);
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
                                              const Scales& scales) {
    std::uint32_t a[kFragments][4];
    ColumnScales<LaneCodes> of_lane;
    of_lane.load(scales.values(0, kStep), lane_ % 4);
    codes.template centered<0, kStep>(a[0], of_lane.minus_part);
    of_lane.template apply<T>(a[0]);
    if (!scales.is_shared()) of_lane.load(scales.values(1, kStep), lane_ % 4);
    codes.template centered<1, kStep>(a[1], of_lane.minus_part);
    of_lane.template apply<T>(a[1]);
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      simt::mma_m16n8k16<T>(y_[0][j], a[0], b[j][kStep]);
      simt::mma_m16n8k16<T>(y_[1][j], a[1], b[j][kStep]);
    }
  }

  const LinearParams& p_;
  int lane_;
  int x_place_[kTokenTiles];  // of the row and the eight columns that the lane names to ldmatrix
  int group_ = 0, steps_left_ = 0;  // the group that is summed, and steps of it that are to come
  float y_[kFragments][kTokenTiles][4] = {};
  float dot_[kFragments][kTokenTiles][4] = {};
  float x_sum_[kTokenTiles][4] = {};
};

template <class T, int kLow, int kHigh, Scaling kScaling, int kTokenTiles>
__global__ void __launch_bounds__(kDecodeThreads, 2) decode_kernel(LinearParams p) {
  using Sums = DecodeSums<T, kLow, kHigh, kScaling, kTokenTiles>;
  using Stream = typename Sums::Stream;
  using Scales = typename Sums::Scales;
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
  unsigned char* ring = shared + p.warps_offset + warp * p.warp_bytes;
  const unsigned char* col_scale = col_scale_of(p, expert);
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
    const int strip = first_strip + strip_in_block;
    Scales scales(p, expert, strip, begin, ring + Stream::kRingBytes);
    Stream stream(p, expert, strip, begin, end, ring);
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
      sums.add_stage(stream, scales, x + (stream.tile() - block_begin) * kTileCols);
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

// y = x W_r^T for many rows of x: tiles of 128 rows of W and 64 of x; weights become 16-bit floats
// in the registers that tensor cores read, once for all 64.
#pragma once

#include "cuda/device/linear/code_stream.hpp"
#include "cuda/device/linear/finish.hpp"
#include "cuda/device/linear/fragments.hpp"
#include "cuda/device/linear/scale_stream.hpp"
#include "cuda/device/linear/store_strip.hpp"
#include "cuda/device/linear/tokens.hpp"

namespace hqq::cuda::device {

template <class T, int kLow, int kHigh, Scaling kScaling>
class GemmSums {
 public:
  static_assert(kScaling != Scaling::kSums);
  using LaneCodes = Codes<T, kLow, kHigh>;
  using Stream = CodeStream<kLow + kHigh, 1, kGemmRing>;
  using Scales = ScaleStream<T, kLow + kHigh, kScaling>;
  static constexpr int kTokenTiles = kGemmTokens / 8;

  __device__ GemmSums(const LinearParams& p, int tokens)
      : p_(p), lane_(static_cast<int>(threadIdx.x % 32)), tokens_(tokens) {}

  __device__ __forceinline__ void add_tile(const Stream& stream, Scales& scales,
                                           const std::uint16_t* x) {
    if constexpr (kScaling == Scaling::kColumns) {
      scales.advance();
    } else {
      scales.require(stream.tile(), 1);
    }
    LaneCodes codes;
    codes.load(stream.codes(), lane_);
    step<0>(codes, stream.tile(), scales, x);
    step<1>(codes, stream.tile(), scales, x);
    step<2>(codes, stream.tile(), scales, x);
    step<3>(codes, stream.tile(), scales, x);
  }

  __device__ __forceinline__ void store(float* sums, int stride, int strip_row) const {
    store_strip(y_, lane_, sums, stride, strip_row);
  }

 private:
  template <int kStep>
  __device__ __forceinline__ void step(const LaneCodes& codes, int tile, const Scales& scales,
                                       const std::uint16_t* x) {
    std::uint32_t a[kFragments][4];
    if constexpr (kScaling == Scaling::kColumns) {
      ColumnScales<LaneCodes> of_lane;
      of_lane.load(scales.values(0, kStep), lane_ % 4);
      codes.template centered<0, kStep>(a[0], of_lane.minus_part);
      of_lane.template apply<T>(a[0]);
      if (!scales.is_shared()) of_lane.load(scales.values(1, kStep), lane_ % 4);
      codes.template centered<1, kStep>(a[1], of_lane.minus_part);
      of_lane.template apply<T>(a[1]);
    } else {
      // A group of whole tiles needs no look at every step.
      if (kStep == 0 || p_.group_steps.divisor % kSteps != 0) {
        const int group = p_.group_steps(tile * kSteps + kStep);
        constexpr int kMaxCode = (1 << LaneCodes::kBits) - 1;
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          scales_[f].template set<T>(scales.rows(group, f, lane_ / 4), kMaxCode);
        }
      }
      codes.template centered<0, kStep>(a[0], scales_[0].minus_part);
      scales_[0].template apply<T>(a[0]);
      codes.template centered<1, kStep>(a[1], scales_[1].minus_part);
      scales_[1].template apply<T>(a[1]);
    }
#pragma unroll
    for (int j = 0; j < kTokenTiles; j += 2) {
      if (8 * j >= tokens_) break;
      // Columns 0-7 and 8-15 of eight tokens, then of the next eight.
      std::uint32_t r[4];
      simt::ldmatrix_x4(r, x + (8 * j + lane_ / 16 * 8 + lane_ % 8) * kGemmXStride +
                               kStep * kStepCols + lane_ / 8 % 2 * 8);
      const std::uint32_t b[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        simt::mma_m16n8k16<T>(y_[0][j + i], a[0], b[i]);
        simt::mma_m16n8k16<T>(y_[1][j + i], a[1], b[i]);
      }
    }
  }

  const LinearParams& p_;
  int lane_, tokens_;
  RowScales<LaneCodes> scales_[kFragments];
  float y_[kFragments][kTokenTiles][4] = {};
};

// Copies 64 columns of up to 64 tokens at a time to a stage: a thread the same 16 bytes of every
// 16th token. p.x is aligned, with ceil8(K) columns.
class XStream {
 public:
  __device__ XStream(const LinearParams& p, std::int64_t first_token, int tokens, int first_tile)
      : col_(first_tile * kTileCols + static_cast<int>(threadIdx.x) % kVectors * kVector),
        K_(p.K),
        token_(static_cast<int>(threadIdx.x) / kVectors),
        tokens_(tokens),
        step_(kTokenStep * p.x_stride),
        row_(p.x + (token_ < tokens ? first_token + token_ : 0) * p.x_stride) {}

  __device__ __forceinline__ void request_next(std::uint16_t* stage) {
    stage += token_ * kGemmXStride + static_cast<int>(threadIdx.x) % kVectors * kVector;
#pragma unroll
    for (int i = 0; i < kGemmTokens / kTokenStep; ++i) {
      const bool inside = token_ + i * kTokenStep < tokens_ && col_ < K_;
      simt::cp_async_16(stage + i * kTokenStep * kGemmXStride,
                        row_ + (inside ? i * step_ + col_ : 0), inside);
    }
    col_ += kTileCols;
  }

 private:
  static constexpr int kVector = 8, kVectors = kTileCols / kVector;
  static constexpr int kTokenStep = kGemmThreads / kVectors;

  int col_, K_, token_, tokens_;
  std::int64_t step_;
  const std::uint16_t* row_;
};

template <class T, int kLow, int kHigh, Scaling kScaling>
__global__ void __launch_bounds__(kGemmThreads, 3) gemm_kernel(LinearParams p) {
  using Sums = GemmSums<T, kLow, kHigh, kScaling>;
  using Stream = typename Sums::Stream;
  using Scales = typename Sums::Scales;
  const int expert = static_cast<int>(blockIdx.z);
  const Tokens all = tokens_of(p, expert);
  const std::int64_t first = all.begin + static_cast<std::int64_t>(blockIdx.y) * kGemmTokens;
  if (first >= all.end) return;

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int split = static_cast<int>(blockIdx.x) % p.splits;
  const int first_strip = static_cast<int>(blockIdx.x) / p.splits * kGemmWarps;
  const int begin = split * p.tiles_per_split;
  const int end = begin + p.tiles_per_split < p.tiles ? begin + p.tiles_per_split : p.tiles;
  const bool has_strip = first_strip + warp < p.strips;

  unsigned char* shared = simt::shared_memory();
  const auto x_of = [&](int stage) {
    return reinterpret_cast<std::uint16_t*>(shared + kCounterShared +
                                            stage % kGemmRing * kGemmXBytes);
  };
  unsigned char* ring = shared + p.warps_offset + warp * p.warp_bytes;

  for (std::int64_t token = first; token < all.end;
       token += static_cast<std::int64_t>(gridDim.y) * kGemmTokens) {
    const int tokens =
        all.end - token < kGemmTokens ? static_cast<int>(all.end - token) : kGemmTokens;
    // Without a strip, a warp helps with x only.
    const int strip = has_strip ? first_strip + warp : 0;
    Scales scales(p, expert, strip, begin, ring + Stream::kRingBytes);
    Stream stream(p, expert, strip, begin, has_strip ? end : begin, ring);
    XStream x(p, token, tokens, begin);
    const auto request = [&](int stage) {
      if (begin + stage < end) {
        stream.request_next();
        x.request_next(x_of(stage));
      }
      simt::cp_async_commit();
    };
#pragma unroll
    for (int stage = 0; stage < kGemmRing - 1; ++stage) request(stage);

    Sums sums(p, tokens);
    for (int stage = 0; stage < end - begin; ++stage) {
      simt::cp_async_wait<kGemmRing - 2>();
      __syncthreads();
      request(stage + kGemmRing - 1);
      if (!has_strip) continue;
      sums.add_tile(stream, scales, x_of(stage));
      stream.advance();
    }
    __syncthreads();  // the rings have been read; their place is that of the sums
    auto* block_sums = reinterpret_cast<float*>(shared + kCounterShared);
    sums.store(block_sums, sums_stride(kGemmWarps * kTileRows), warp * kTileRows);
    finish<T>(p, block_sums, {1, kGemmTokens, first_strip * kTileRows, token, tokens}, expert,
              split);
    __syncthreads();
  }
}

}  // namespace hqq::cuda::device

// Axis 0: scales and zeros of the columns of a tile.
#pragma once

#include <cstdint>

#include "cuda/device/linear/fragments.hpp"
#include "cuda/device/linear/launch_shape.hpp"
#include "cuda/device/linear/scale_loads.hpp"

namespace hqq::cuda::device {

// Two slots in shared memory that belong to one warp, for this tile and the last; the next one is
// on its way to registers. A slot is, for each fragment and step of 16 columns, three rows of 16
// values of the type of x: scale; minus the integer part of zero; minus the rest of zero times
// scale. Columns are in the order 0 1 8 9, 2 3 10 11, ..., so that a lane's four are contiguous.
template <class T, int kMaxCode>
class ColumnScaleStream {
 public:
  // Begins with `tile`. A lane loads two columns.
  __device__ ColumnScaleStream(const LinearParams& p, int expert, int strip, int tile,
                               unsigned char* ring)
      : p_(p),
        expert_(expert),
        tile_(tile),
        fragments_(p.group_size % kTileRows == 0 ? 1 : kFragments),
        ring_(ring) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      // Padding rows are not written: any row of scales will do.
      const int row = (strip * kTileRows + f * kFragmentRows) / p.group_size;
      scale_row_[f] = row < p.scale_rows ? row : p.scale_rows - 1;
    }
    load();
  }

  // Makes the next tile readable, and no longer the one before the last. By all lanes.
  __device__ __forceinline__ void advance() {
    store(0);
    if (fragments_ > 1) store(1);
    ++tile_;
    load();
    __syncwarp();
  }

  // Whether both fragments have the same scales: those of fragment 0.
  __device__ __forceinline__ bool is_shared() const { return fragments_ == 1; }

  // The values of the tile that advance() has made readable.
  __device__ __forceinline__ const unsigned char* values(int fragment, int step) const {
    return slot_of(tile_ - 1) + fragment * kColumnFragmentBytes + step * kColumnStepBytes;
  }

 private:
  static constexpr int kColumns = kLaneColumns;

  __device__ unsigned char* slot_of(int tile) const {
    return ring_ + tile % 2 * kFragments * kColumnFragmentBytes;
  }
  __device__ int col() const {
    return tile_ * kTileCols + kColumns * static_cast<int>(threadIdx.x % 32);
  }
  __device__ std::int64_t index(int fragment) const {
    return static_cast<std::int64_t>(scale_row_[fragment]) * p_.K + col();
  }

  __device__ __forceinline__ void load() {
    if (!p_.half_scales) return;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      if (f >= fragments_) continue;
      scale_[f].load(p_.scale, expert_, index(f), p_.K - col(), p_.scales_aligned);
      zero_[f].load(p_.zero, expert_, index(f), p_.K - col(), p_.scales_aligned);
    }
  }

  // Types of other sizes come straight from memory.
  __device__ __forceinline__ void store(int f) {
    float scale[kColumns] = {}, zero[kColumns] = {};
    if (p_.half_scales) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        scale[i] = scale_[f].value(p_.scale.type, i);
        zero[i] = zero_[f].value(p_.zero.type, i);
      }
    } else {
      const Metadata scales = metadata_of(p_.scale, expert_), zeros = metadata_of(p_.zero, expert_);
      // One copy of this code is enough: the first column moves on when the second is read.
#pragma unroll 1
      for (int i = 0; i < kColumns; ++i) {
        const bool exists = col() + i < p_.K;
        scale[0] = scale[1], zero[0] = zero[1];
        scale[1] = exists ? scales(index(f) + i) : 0.0f;
        zero[1] = exists ? zeros(index(f) + i) : 0.0f;
      }
    }
    const float part[kColumns] = {integer_part(zero[0], kMaxCode), integer_part(zero[1], kMaxCode)};
    const int lane = static_cast<int>(threadIdx.x % 32), pair = lane % (kStepCols / kColumns);
    auto* out = reinterpret_cast<std::uint32_t*>(slot_of(tile_) + f * kColumnFragmentBytes +
                                                 lane / (kStepCols / kColumns) * kColumnStepBytes) +
                pair % 4 * 2 + pair / 4;
    constexpr int kRowWords = kStepCols / kColumns;
    st_shared(out, simt::pack2<T>(scale[0], scale[1]));
    st_shared(out + kRowWords, simt::pack2<T>(-part[0], -part[1]));
    st_shared(out + 2 * kRowWords,
              simt::pack2<T>(-(zero[0] - part[0]) * scale[0], -(zero[1] - part[1]) * scale[1]));
  }

  const LinearParams& p_;
  int expert_;
  int tile_;       // that is on its way
  int fragments_;  // one where both fragments of a strip share a row of scales
  unsigned char* ring_;
  int scale_row_[kFragments];
  HalfValues<kColumns> scale_[kFragments], zero_[kFragments];
};

// Scale and zero of a lane's columns in one step.
template <class LaneCodes>
struct ColumnScales {
  std::uint32_t scale[2];  // columns 2 t and 2 t + 1, then 2 t + 8 and 2 t + 9
  std::uint32_t rest[2];
  std::uint32_t minus_part[4];  // for Codes::centered()

  __device__ __forceinline__ void load(const unsigned char* step, int t) {
    const auto* values = reinterpret_cast<const uint2*>(step);
    const uint2 s = ld_shared(values + t);
    const uint2 part = ld_shared(values + 4 + t);
    const uint2 r = ld_shared(values + 8 + t);
    scale[0] = s.x, scale[1] = s.y;
    rest[0] = r.x, rest[1] = r.y;
    minus_part[0] = LaneCodes::prepare2(part.x, 0);
    minus_part[1] = LaneCodes::prepare2(part.x, 1);
    minus_part[2] = LaneCodes::prepare2(part.y, 0);
    minus_part[3] = LaneCodes::prepare2(part.y, 1);
  }
  // a: code - part; becomes the weight.
  template <class T>
  __device__ __forceinline__ void apply(std::uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = T::fma2(a[i], scale[i / 2], rest[i / 2]);
  }
};

}  // namespace hqq::cuda::device

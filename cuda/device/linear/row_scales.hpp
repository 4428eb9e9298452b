// Axis 1: scales and zeros of the rows of a strip, group after group.
#pragma once

#include <cstdint>

#include "cuda/device/linear/fragments.hpp"
#include "cuda/device/linear/launch_shape.hpp"
#include "cuda/device/linear/scale_loads.hpp"

namespace hqq::cuda::device {

// Scale and zero of rows g and g + 8 of a fragment.
struct RowPair {
  float scale[2], zero[2];
};

// A ring in shared memory that belongs to one warp. A window of four groups is put there at a time,
// while the next one is on its way to registers. An entry is a group: fragment by fragment, g by g,
// (scale, zero) of row g and (scale, zero) of row g + 8, in float16 if both are stored so, else in
// float32.
class RowScaleStream {
 public:
  // Begins with the group of `tile`. A lane loads those of one row.
  __device__ RowScaleStream(const LinearParams& p, int expert, int strip, int tile,
                            unsigned char* ring)
      : p_(p),
        expert_(expert),
        row_(strip * kTileRows + static_cast<int>(threadIdx.x % 32)),
        next_(p.group_steps(tile * kSteps) / kWindowGroups * kWindowGroups),
        ring_(ring) {
    // Rows of padding are not written: any scales will do.
    if (row_ >= p.N) row_ = p.N - 1;
    load();
  }

  // Makes the groups of a stage of tiles readable. By all lanes.
  __device__ __forceinline__ void require(int tile, int count) {
    const int last = p_.group_steps((tile + count) * kSteps - 1);
    if (last < next_) return;
    __syncwarp();  // the entries that are overwritten have been read
    do {
      store();
      next_ += kWindowGroups;
      load();
    } while (last >= next_);
    __syncwarp();
  }

  __device__ __forceinline__ RowPair rows(int group, int fragment, int g) const {
    const unsigned char* entry = entry_of(group);
    const int index = fragment * kFragmentRows / 2 + g;
    if (p_.float_metadata) {
      const float4 v = ld_shared(reinterpret_cast<const float4*>(entry) + index);
      return {{v.x, v.z}, {v.y, v.w}};
    }
    const uint2 v = ld_shared(reinterpret_cast<const uint2*>(entry) + index);
    const auto value = [](std::uint32_t bits) {
      return F16::to_float(static_cast<std::uint16_t>(bits));
    };
    return {{value(v.x), value(v.y)}, {value(v.x >> 16), value(v.y >> 16)}};
  }

 private:
  // Bytes from the start of an entry to those of the row that a lane loads.
  __device__ int lane_offset() const {
    const auto row = static_cast<int>(threadIdx.x % 32);
    const int place = row / kFragmentRows * kFragmentRows + row % 8 * 2 + row % kFragmentRows / 8;
    return place * row_entry_bytes(p_.float_metadata) / kTileRows;
  }
  // In the tensor, of a group of that row.
  __device__ std::int64_t index(int group) const {
    return static_cast<std::int64_t>(row_) * p_.groups + group;
  }
  __device__ unsigned char* entry_of(int group) const {
    return ring_ + (group & (p_.ring_groups - 1)) * row_entry_bytes(p_.float_metadata);
  }

  // The window from next_ on to registers.
  __device__ __forceinline__ void load() {
    if (!p_.half_scales) return;
    const int count = p_.groups - next_;
    scale_.load(p_.scale, expert_, index(next_), count, p_.scales_aligned);
    zero_.load(p_.zero, expert_, index(next_), count, p_.scales_aligned);
  }

  // And from there to the ring; other types straight from memory, where neighbours of the last
  // window are in the cache.
  __device__ __forceinline__ void store() {
    unsigned char* out = entry_of(next_) + lane_offset();
    if (!p_.half_scales) {
      store_converted(out);
      return;
    }
#pragma unroll
    for (int i = 0; i < kWindowGroups; ++i) {
      if (p_.float_metadata) {
        st_shared(reinterpret_cast<float2*>(out + i * row_entry_bytes(true)),
                  make_float2(scale_.value(DType::kBF16, i), zero_.value(DType::kBF16, i)));
      } else {
        st_shared(reinterpret_cast<std::uint32_t*>(out + i * row_entry_bytes(false)),
                  scale_.bits(i) | zero_.bits(i) << 16);
      }
    }
  }
  __device__ __forceinline__ void store_converted(unsigned char* out) const {
    const Metadata scale = metadata_of(p_.scale, expert_), zero = metadata_of(p_.zero, expert_);
#pragma unroll 1
    for (int group = next_; group < next_ + kWindowGroups; ++group) {
      float2 v = make_float2(0.0f, 0.0f);
      // Columns of padding may be in groups that do not exist.
      if (group < p_.groups) v = make_float2(scale(index(group)), zero(index(group)));
      st_shared(reinterpret_cast<float2*>(out), v);
      out += row_entry_bytes(true);
    }
  }

  const LinearParams& p_;
  int expert_;
  int row_;   // whose values the lane loads
  int next_;  // first group that is not in the ring
  unsigned char* ring_;
  HalfValues<kWindowGroups> scale_, zero_;
};

// For gemm_kernel: of rows g and g + 8 of a fragment, twice in a word.
template <class LaneCodes>
struct RowScales {
  std::uint32_t scale[2], rest[2];
  std::uint32_t minus_part[4];

  template <class T>
  __device__ __forceinline__ void set(const RowPair& rows, int max_code) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const float part = integer_part(rows.zero[odd], max_code);
      scale[odd] = twice<T>(rows.scale[odd]);
      rest[odd] = twice<T>(-(rows.zero[odd] - part) * rows.scale[odd]);
      minus_part[odd] = minus_part[odd + 2] = twice<T>(LaneCodes::prepare(-part, odd));
    }
  }
  template <class T>
  __device__ __forceinline__ void apply(std::uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = T::fma2(a[i], scale[i % 2], rest[i % 2]);
  }
};

}  // namespace hqq::cuda::device

// The codes of a strip on their way to a warp.
#pragma once

#include <cstdint>

#include "cuda/device/format/tile.hpp"
#include "cuda/device/linear/params.hpp"
#include "cuda/device/simt/simt.hpp"

namespace hqq::cuda::device {

// The tiles [begin, end) of a strip, through a ring in shared memory that belongs to one warp. A
// stage is kStageTiles tiles; `begin` is a multiple of it.
template <int kBits, int kStageTiles, int kDepth>
class CodeStream {
 public:
  static constexpr int kStageBytes = kStageTiles * tile_bytes(kBits);
  static constexpr int kRingBytes = kDepth * kStageBytes;

  __device__ CodeStream(const LinearParams& p, int expert, int strip, int begin, int end,
                        unsigned char* ring)
      : lane_(static_cast<int>(threadIdx.x % 32)),
        tile_(begin),
        requested_(begin),
        end_(end),
        ring_(ring),
        read_(0),
        write_(0),
        codes_(p.codes + expert * p.codes_stride +
               (static_cast<std::int64_t>(strip) * p.tiles + begin) * tile_bytes(kBits) +
               16 * lane_) {}

  // The stage that is multiplied.
  __device__ int tile() const { return tile_; }
  __device__ int tiles() const { return tiles_from(tile_); }
  __device__ bool done() const { return tile_ >= end_; }
  __device__ bool last() const { return tile_ + kStageTiles >= end_; }
  __device__ const unsigned char* codes() const { return ring_ + read_; }
  __device__ void advance() {
    tile_ += kStageTiles;
    read_ = next(read_);
  }

  // Starts the copies of the next stage that has not been asked for, if any, without a commit.
  __device__ __forceinline__ void request_next() {
    if (requested_ >= end_) return;
    const int count = tiles_from(requested_);
    unsigned char* slot = ring_ + write_ + 16 * lane_;
    if (count == kStageTiles) {
      copy_stage(slot);
    } else {
      copy_part(slot, count * tile_bytes(kBits));
    }
    requested_ += kStageTiles;
    codes_ += kStageBytes;
    write_ = next(write_);
  }

 private:
  static constexpr int kWarpBytes = 32 * 16;  // that one instruction copies

  __device__ int tiles_from(int tile) const {
    return end_ - tile < kStageTiles ? end_ - tile : kStageTiles;
  }
  __device__ int next(int slot) const {
    slot += kStageBytes;
    return slot == kRingBytes ? 0 : slot;
  }
  __device__ __forceinline__ void copy_stage(unsigned char* to) const {
#pragma unroll
    for (int at = 0; at < kStageBytes; at += kWarpBytes) {
      if (at + kWarpBytes <= kStageBytes || 16 * lane_ < kStageBytes - at) {
        simt::cp_async_16(to + at, codes_ + at);
      }
    }
  }
  __device__ __forceinline__ void copy_part(unsigned char* to, int bytes) const {
#pragma unroll 1
    for (int at = 0; at + 16 * lane_ < bytes; at += kWarpBytes) {
      simt::cp_async_16(to + at, codes_ + at);
    }
  }

  int lane_, tile_, requested_, end_;
  unsigned char* ring_;
  int read_, write_;            // bytes from the start of the ring
  const unsigned char* codes_;  // of the next request, at the place of the lane
};

}  // namespace hqq::cuda::device

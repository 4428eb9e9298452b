// From the registers of tensor cores to sums in shared memory.
#pragma once

#include "cuda/device/format/tile.hpp"
#include "cuda/device/simt/simt.hpp"

namespace hqq::cuda::device {

// A warp's sums, as mma leaves them, to sums[token][row] in shared memory.
template <int kTokenTiles>
__device__ __forceinline__ void store_strip(const float (&y)[kFragments][kTokenTiles][4], int lane,
                                            float* sums, int stride, int strip_row) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = strip_row + f * kFragmentRows + i / 2 * 8 + g;
        st_shared(sums + (8 * j + 2 * t + i % 2) * stride + row, y[f][j][i]);
      }
    }
  }
}

}  // namespace hqq::cuda::device

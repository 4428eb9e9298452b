// Scales and zeros of format 1 on their way to the kernels.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/device/format/metadata.hpp"
#include "cuda/device/linear/params.hpp"

namespace hqq::cuda::device {

__device__ __forceinline__ Metadata metadata_of(const MetadataParams& p, int expert) {
  return {p.type, p.values + expert * p.stride,
          reinterpret_cast<const float*>(p.step + expert * p.step_stride),
          reinterpret_cast<const float*>(p.offset + expert * p.offset_stride)};
}

// kCount (2 or 4) neighbouring values of 16 bits. They are loaded long before they are used, so
// that nothing waits for them.
template <int kCount>
class HalfValues {
 public:
  static_assert(kCount == 2 || kCount == 4);

  // From index `at` of the tensor on. Those from `count` on do not exist, and become 0. aligned: a
  // single load may read all.
  __device__ __forceinline__ void load(const MetadataParams& p, int expert, std::int64_t at,
                                       int count, bool aligned) {
    const auto* from = reinterpret_cast<const std::uint16_t*>(p.values + expert * p.stride) + at;
    if (aligned && count >= kCount) {
      load_together(from);
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      std::uint32_t word = i < count ? ld_global(from + i) : 0u;
      if (i + 1 < count) word |= static_cast<std::uint32_t>(ld_global(from + i + 1)) << 16;
      words_[i / 2] = word;
    }
  }

  __device__ __forceinline__ std::uint32_t bits(int i) const {
    return words_[i / 2] >> (16 * (i % 2)) & 0xFFFFu;
  }
  __device__ __forceinline__ float value(DType type, int i) const {
    return half_value(type, bits(i));
  }

 private:
  __device__ __forceinline__ void load_together(const std::uint16_t* from) {
    if constexpr (kCount == 4) {
      const uint2 v = ld_global(reinterpret_cast<const uint2*>(from));
      words_[0] = v.x, words_[1] = v.y;
    } else {
      words_[0] = ld_global(reinterpret_cast<const std::uint32_t*>(from));
    }
  }

  std::uint32_t words_[kCount / 2] = {};
};

// What is taken from a zero before it is multiplied with a scale in 16 bits: an integer in the
// range of the codes, so that code - part is exact.
__device__ __forceinline__ float integer_part(float zero, int max_code) {
  constexpr float kRound = 0x1.8p23f;  // of an ulp of 1
  return ::fminf(::fmaxf(zero, 0.0f), static_cast<float>(max_code)) + kRound - kRound;
}

}  // namespace hqq::cuda::device

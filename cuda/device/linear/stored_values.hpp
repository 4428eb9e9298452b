// Scales and zeros of format 1 on their way to the kernels: loaded as they are stored, so that
// nothing waits for them, and converted when they are needed.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/device/format/metadata.hpp"
#include "cuda/device/linear/params.hpp"

namespace hqq::cuda::device {

// Up to kCount (2 or 4) neighbouring values of a lane. Those beyond `count` are 0.
template <int kCount>
class StoredValues {
 public:
  static_assert(kCount == 2 || kCount == 4);

  // Values `at` and after of an array. aligned: all kCount exist, and one load may read them.
  __device__ __forceinline__ void load(DType type, const unsigned char* values, std::int64_t at,
                                       int count, bool aligned) {
    switch (type) {
      case DType::kU8:
        return load_as<std::uint8_t>(values, at, count, aligned);
      case DType::kF16:
      case DType::kBF16:
        return load_as<std::uint16_t>(values, at, count, aligned);
      default:
        return load_as<std::uint32_t>(values, at, count, aligned);
    }
  }

  // Bits of value i of a 16-bit type.
  __device__ __forceinline__ std::uint32_t half(int i) const {
    return words_[i / 2] >> (16 * (i % 2)) & 0xFFFFu;
  }

  // Value i; of kU8: its code.
  __device__ __forceinline__ float value(DType type, int i) const {
    switch (type) {
      case DType::kF16:
        return F16::to_float(static_cast<std::uint16_t>(half(i)));
      case DType::kBF16:
        return BF16::to_float(static_cast<std::uint16_t>(half(i)));
      case DType::kU8:
        return static_cast<float>(words_[i / 4] >> (8 * (i % 4)) & 0xFFu);
      default:
        return __uint_as_float(words_[i]);
    }
  }

 private:
  template <class Stored>
  __device__ __forceinline__ void load_as(const unsigned char* values, std::int64_t at, int count,
                                          bool aligned) {
    const Stored* from = reinterpret_cast<const Stored*>(values) + at;
    if (aligned) return load_together(from);
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(Stored));
#pragma unroll
    for (int i = 0; i < kCount; ++i) words_[i] = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) {
        words_[i / kPerWord] |= static_cast<std::uint32_t>(ld_global(from + i))
                                << (32 / kPerWord * (i % kPerWord) % 32);
      }
    }
  }

  template <class Stored>
  __device__ __forceinline__ void load_together(const Stored* from) {
    constexpr int kBytes = kCount * static_cast<int>(sizeof(Stored));
    if constexpr (kBytes == 16) {
      const uint4 v = ld_global(reinterpret_cast<const uint4*>(from));
      words_[0] = v.x, words_[1] = v.y, words_[2] = v.z, words_[3] = v.w;
    } else if constexpr (kBytes == 8) {
      const uint2 v = ld_global(reinterpret_cast<const uint2*>(from));
      words_[0] = v.x, words_[1] = v.y;
    } else if constexpr (kBytes == 4) {
      words_[0] = ld_global(reinterpret_cast<const std::uint32_t*>(from));
    } else {
      words_[0] = ld_global(reinterpret_cast<const std::uint16_t*>(from));
    }
  }

  std::uint32_t words_[kCount];
};

// Scales or zeros of an expert.
template <int kCount>
class StoredMetadata {
 public:
  // As StoredValues::load().
  __device__ __forceinline__ void load(const MetadataParams& p, int expert, std::int64_t at,
                                       int count, bool aligned) {
    stored_.load(p.type, p.values + expert * p.stride, at, count, aligned);
  }
  __device__ __forceinline__ std::uint32_t half(int i) const { return stored_.half(i); }
  // Value i, which exists and has the index `at` in the tensor.
  __device__ __forceinline__ float value(const MetadataParams& p, int expert, std::int64_t at,
                                         int i) const {
    const float value = stored_.value(p.type, i);
    if (p.type != DType::kU8) return value;
    const std::int64_t offset = at / core::kMetadataBlock * static_cast<int>(sizeof(float));
    return value * load_float(p.step + expert * p.step_stride + offset) +
           load_float(p.offset + expert * p.offset_stride + offset);
  }

 private:
  static __device__ __forceinline__ float load_float(const unsigned char* address) {
    return ld_global(reinterpret_cast<const float*>(address));
  }

  StoredValues<kCount> stored_;
};

// What is taken from a zero before it is multiplied with a scale in 16 bits: an integer in the
// range of the codes, so that code - part is exact.
__device__ __forceinline__ float integer_part(float zero, int max_code) {
  constexpr float kRound = 0x1.8p23f;  // of an ulp of 1
  return ::fminf(::fmaxf(zero, 0.0f), static_cast<float>(max_code)) + kRound - kRound;
}

}  // namespace hqq::cuda::device

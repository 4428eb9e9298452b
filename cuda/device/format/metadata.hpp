// Reading scales and zeros of format 1 on the device, whatever their type.
#pragma once

#include <cstdint>

#include "cuda/api.hpp"
#include "cuda/device/simt/simt.hpp"
#include "hqq/core/metadata.hpp"

namespace hqq::cuda::device {

// The low half of `bits` as kF16 or kBF16.
__device__ __forceinline__ float half_value(DType type, std::uint32_t bits) {
  const auto half = static_cast<std::uint16_t>(bits);
  return type == DType::kF16 ? F16::to_float(half) : BF16::to_float(half);
}

// Element i of an array of any float type.
__device__ inline float load_float(DType type, const void* values, std::int64_t i) {
  switch (type) {
    case DType::kF16:
      return F16::to_float(ld_global(static_cast<const std::uint16_t*>(values) + i));
    case DType::kBF16:
      return BF16::to_float(ld_global(static_cast<const std::uint16_t*>(values) + i));
    case DType::kF64:
      return static_cast<float>(ld_global(static_cast<const double*>(values) + i));
    default:
      return ld_global(static_cast<const float*>(values) + i);
  }
}

// A stored scale or zero: values, or 8-bit codes with a step and offset per block of groups.
struct Metadata {
  DType type;
  const void* values;
  const float* step;
  const float* offset;

  __device__ float operator()(std::int64_t group) const {
    if (type != DType::kU8) return load_float(type, values, group);
    const auto code =
        static_cast<float>(ld_global(static_cast<const std::uint8_t*>(values) + group));
    return code * ld_global(step + group / core::kMetadataBlock) +
           ld_global(offset + group / core::kMetadataBlock);
  }
};

inline Metadata scale_of(const DeviceMatrix& q) {
  return {q.scale_type, q.scale, q.scale_step, q.scale_offset};
}
inline Metadata zero_of(const DeviceMatrix& q) {
  return {q.zero_type, q.zero, q.zero_step, q.zero_offset};
}

}  // namespace hqq::cuda::device

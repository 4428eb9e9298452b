// Stored scales and zeros.
#pragma once

#include <cstdint>

#include "cuda/api.hpp"
#include "cuda/device/solve/weights.hpp"
#include "hqq/core/math.hpp"
#include "hqq/core/metadata.hpp"

namespace hqq::cuda::device {

// Where scales or zeros are stored.
struct MetadataTarget {
  DType type;  // kF16, kBF16, kF32, or kU8 with step and offset
  void* values;
  float* step;
  float* offset;
};

inline MetadataTarget scale_target(const DeviceMatrix& q) {
  return {q.scale_type, q.scale, q.scale_step, q.scale_offset};
}
inline MetadataTarget zero_target(const DeviceMatrix& q) {
  return {q.zero_type, q.zero, q.zero_step, q.zero_offset};
}

// Returns what will be read back.
__device__ inline float write_float(DType type, void* values, std::int64_t i, float x) {
  if (type == DType::kF32) {
    st_global(static_cast<float*>(values) + i, x);
    return x;
  }
  const std::uint16_t bits =
      type == DType::kF16 ? core::scalar::f32_to_f16_bits(x) : core::scalar::f32_to_bf16_bits(x);
  st_global(static_cast<std::uint16_t*>(values) + i, bits);
  return type == DType::kF16 ? core::scalar::f16_bits_to_f32(bits)
                             : core::scalar::bf16_bits_to_f32(bits);
}

__device__ inline void check_stored(QuantizeProblems* problems, float stored, std::int64_t group) {
  if (stored - stored == 0.0f || problems == nullptr) return;
  atomicMin(reinterpret_cast<Counter*>(&problems->first_overflow), static_cast<Counter>(group));
}

__device__ inline void check_scale(QuantizeProblems* problems, float stored, float small,
                                   std::int64_t group) {
  check_stored(problems, stored, group);
  if (stored > small || problems == nullptr) return;
  atomicMin(reinterpret_cast<Counter*>(&problems->first_small), static_cast<Counter>(group));
}

// Stores solved values of n groups from `begin` on; with 8 bits these are one block. Calls
// stored(group, value) for each, the value as it will be read back.
template <class Stored>
__device__ inline void store_metadata(const MetadataTarget& a, const float* solved,
                                      std::int64_t begin, std::int64_t n, const Stored& stored) {
  if (a.type != DType::kU8) {
    for (std::int64_t g = begin; g < begin + n; ++g) {
      stored(g, write_float(a.type, a.values, g, ld_global(solved + g)));
    }
    return;
  }
  const core::MetadataStep block =
      core::metadata_step([&](std::int64_t i) { return ld_global(solved + begin + i); }, n);
  st_global(a.step + begin / core::kMetadataBlock, block.step);
  st_global(a.offset + begin / core::kMetadataBlock, block.offset);
  for (std::int64_t g = begin; g < begin + n; ++g) {
    const std::uint8_t code = core::metadata_code(ld_global(solved + g), block);
    st_global(static_cast<std::uint8_t*>(a.values) + g, code);
    stored(g, core::metadata_value(code, block));
  }
}

struct StoreArgs {
  MetadataTarget scale, zero;
  std::int64_t groups = 0;
  std::int64_t groups_per_thread = 1;  // kMetadataBlock where one of them has 8 bits
  float max_code = 0.0f;
  float small_scale = 0.0f;
  const float* solved_scale = nullptr;
  float* solved_zero = nullptr;
  QuantizeProblems* problems = nullptr;
};

static __global__ void store_kernel(StoreArgs args) {
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t begin = thread * args.groups_per_thread;
  if (begin >= args.groups) return;
  const std::int64_t rest = args.groups - begin;
  const std::int64_t n = rest < args.groups_per_thread ? rest : args.groups_per_thread;
  const bool refit = args.scale.type == DType::kU8;
  store_metadata(args.scale, args.solved_scale, begin, n, [&](std::int64_t g, float scale) {
    check_scale(args.problems, scale, args.small_scale, g);
    if (!refit) return;
    float* zero = args.solved_zero + g;
    st_global(zero, core::refit_zero(ld_global(zero), ld_global(args.solved_scale + g), scale,
                                     args.max_code));
  });
  store_metadata(args.zero, args.solved_zero, begin, n,
                 [&](std::int64_t g, float zero) { check_stored(args.problems, zero, g); });
}

// What follows from col_scale as stored: 1 / col_scale, and importance in the space of the balanced
// weights, whose error is multiplied by col_scale on the way back.
static __global__ void columns_kernel(DType type, const void* col_scale, std::int64_t cols,
                                      const float* importance, float* inv_col_scale,
                                      float* weights) {
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= cols) return;
  const float t = load_float(type, col_scale, c);
  st_global(inv_col_scale + c, 1.0f / t);
  if (importance != nullptr) {
    st_global(weights + c, ld_global(importance + c) * t * t);
  }
}

}  // namespace hqq::cuda::device

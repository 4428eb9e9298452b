// Errors of the quantized matrix, for statistics: sums in double, in an order that depends on the
// shape alone.
#pragma once

#include <cstdint>

#include "cuda/device/solve/encode.hpp"

namespace hqq::cuda::device {

inline constexpr int kErrorThreads = 256;
// Weights that a block sums.
inline constexpr std::int64_t kErrorSpan = 8192;

struct ErrorArgs {
  EncodeArgs encode;
  DType col_scale_type = DType::kF32;
  const void* col_scale = nullptr;
  core::ErrorSums* partial = nullptr;  // [blocks]
};

__device__ inline core::ErrorSums add(const core::ErrorSums& a, const core::ErrorSums& b) {
  return {a.abs_sum + b.abs_sum, a.square_sum + b.square_sum,
          a.weight_square_sum + b.weight_square_sum, a.max_abs > b.max_abs ? a.max_abs : b.max_abs};
}

__device__ inline core::ErrorSums load_errors(const core::ErrorSums* p, bool in_shared) {
  const double* v = &p->abs_sum;
  if (in_shared) {
    return {simt::ld_shared(v), simt::ld_shared(v + 1), simt::ld_shared(v + 2),
            simt::ld_shared(v + 3)};
  }
  return {ld_global(v), ld_global(v + 1), ld_global(v + 2), ld_global(v + 3)};
}

__device__ inline void store_errors(core::ErrorSums* p, const core::ErrorSums& e, bool in_shared) {
  double* v = &p->abs_sum;
  const double values[] = {e.abs_sum, e.square_sum, e.weight_square_sum, e.max_abs};
  for (int i = 0; i < 4; ++i) {
    if (in_shared)
      simt::st_shared(v + i, values[i]);
    else
      st_global(v + i, values[i]);
  }
}

// All threads of the block: the sum over them, to *out.
__device__ inline void reduce_errors(const core::ErrorSums& mine, core::ErrorSums* out) {
  auto* shared = reinterpret_cast<core::ErrorSums*>(simt::shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  store_errors(shared + thread, mine, true);
  for (int half = kErrorThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread >= half) continue;
    store_errors(shared + thread,
                 add(load_errors(shared + thread, true), load_errors(shared + thread + half, true)),
                 true);
  }
  if (thread == 0) store_errors(out, load_errors(shared, true), false);
}

static __global__ void errors_kernel(const ErrorArgs args) {
  const EncodeArgs& e = args.encode;
  const core::GroupLayout& layout = e.layout;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kErrorSpan;
  const std::int64_t rest = layout.numel() - begin;
  const std::int64_t end = begin + (rest < kErrorSpan ? rest : kErrorSpan);
  core::ErrorSums sums{};
  for (std::int64_t i = begin + threadIdx.x; i < end; i += kErrorThreads) {
    const std::int64_t row = i / layout.cols;
    const std::int64_t col = i - row * layout.cols;
    const std::int64_t group = layout.axis == 1
                                   ? row * layout.groups_per_row() + col / layout.group_size
                                   : i % layout.num_groups();
    const float scale = e.scale(group);
    const Encoder encode{1.0f / scale, e.zero(group), static_cast<float>(e.out.format.max_code)};
    const float raw = raw_weight(e.source, row, col);
    const std::uint32_t code = encode(balanced(e.source, raw, col));
    float restored = (static_cast<float>(code) - encode.zero) * scale;
    if (args.col_scale != nullptr) {
      restored = restored * load_float(args.col_scale_type, args.col_scale, col);
    }
    const auto w = static_cast<double>(raw);
    const double difference = w - static_cast<double>(restored);
    const double error = difference < 0.0 ? -difference : difference;
    sums = add(sums, {error, error * error, w * w, error});
  }
  reduce_errors(sums, args.partial + blockIdx.x);
}

// One block.
static __global__ void sum_errors_kernel(const core::ErrorSums* partial, std::int64_t count,
                                         core::ErrorSums* out) {
  core::ErrorSums sums{};
  for (std::int64_t i = threadIdx.x; i < count; i += kErrorThreads) {
    sums = add(sums, load_errors(partial + i, false));
  }
  reduce_errors(sums, out);
}

}  // namespace hqq::cuda::device

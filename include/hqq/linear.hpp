// y = x W_r^T + bias, on the CPU (docs/kernels.md).
#pragma once

#include "hqq/quantized_tensor.hpp"
#include "hqq/quantizer.hpp"
#include "hqq/tiled_tensor.hpp"

namespace hqq {

// How a product is computed. kExact: x as it is, sums in float32. kFast: x rounded to int8 in
// blocks of up to 64 with a float32 scale each, integer dot products; the relative error of y is
// about 0.6 % for normally distributed x. kAuto: the environment variable HQQ_CPU_MODE ("fast" or
// "exact"), and kFast without it.
enum class LinearMode { kAuto, kFast, kExact };

std::string to_string(LinearMode mode);
// Throws std::invalid_argument for another name than auto, fast and exact.
LinearMode linear_mode_from_string(const std::string& name);

struct LinearOptions {
  LinearMode mode = LinearMode::kAuto;
  int threads = 0;  // 0: default_threads()
};

// y [M, out_features] = x [M, in_features] W_r^T + bias [out_features] (empty: none). Rows of x and
// y are float32, bfloat16, float16 or float64; y has the type of x, and the caller owns its memory.
// The result does not depend on the number of threads. Throws std::invalid_argument when sizes or
// types do not fit, or HQQ_CPU_MODE is neither fast nor exact.
void linear(const TensorView& x, const TiledTensor& q, std::span<const float> bias, void* y,
            const LinearOptions& options = {});

// One of several products that do not depend on each other.
struct LinearCall {
  TensorView x;
  const TiledTensor* q = nullptr;
  std::span<const float> bias;
  void* y = nullptr;
  std::int64_t y_stride = 0;  // elements between rows of y; 0: out_features
};

// All of them, spread over the threads together: the experts that tokens are routed to, or
// projections of one input. The results are those of one call each.
void linear(std::span<const LinearCall> calls, const LinearOptions& options = {});

// The same for weights in format 1, whose rows are put into tiles on the way: for a product that is
// computed once. Weights that are used again are faster as a TiledTensor.
void linear(const TensorView& x, const QuantizedTensor& q, std::span<const float> bias, void* y,
            const LinearOptions& options = {});

}  // namespace hqq

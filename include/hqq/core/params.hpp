// What the solvers are told: plain numbers, the same for every target and device.
#pragma once

#include <cstdint>

namespace hqq::core {

// What scale and zero are rounded to when they are stored.
enum class MetaType : int { kF32, kF16, kBF16 };

// Sums run over chunks of this many weights, chunk by chunk: the error of a sum grows with the
// square root of a long group's length, not with the length.
inline constexpr std::int64_t kChunk = 64;

// Upstream's stop of the hqq solver depends on the error of the whole matrix: a sum in double over
// blocks of this many groups, then over the blocks, each in order.
inline constexpr std::int64_t kErrorBlock = 256;

// Errors of W_r against W over a row or a matrix.
struct ErrorSums {
  double abs_sum = 0.0;
  double square_sum = 0.0;
  double weight_square_sum = 0.0;
  double max_abs = 0.0;
};

// What one pass over the groups of a matrix does.
enum class SolveStep {
  kMinMax,
  kJoint,
  kHqqStart,  // writes the initial 1 / scale and zero
  kHqqSteps,  // kHqqBatch iterations on them
};

// Iterations of hqq that run on a tile of weights while it is in fast memory. Whether to stop is
// known only when all groups have taken a step, so up to kHqqBatch - 1 are wasted; reading the
// weights from memory each time costs more.
inline constexpr int kHqqBatch = 5;

// 1 / beta of a half-quadratic step, and the residual below which shrink() gives 0.
struct Shrinkage {
  float inv_beta = 0.1f;
  float threshold = 0.0f;
};

struct SolverParams {
  float max_code = 15.0f;
  MetaType scale_type = MetaType::kF16;
  MetaType zero_type = MetaType::kF16;
  int iterations = 1;  // refits of joint after the clipping search
  float lp_norm = 2.0f;
  Shrinkage shrinkage;      // joint; hqq has one for every step
  bool round_zero = false;  // hqq only
  bool precise = false;     // joint: sum residuals, since the closed form cancels at >= 6 bits
};

}  // namespace hqq::core

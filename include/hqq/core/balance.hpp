// Sinkhorn balancing after SINQ (arXiv 2509.22944; docs/solver.md, "Balance"): what every backend
// decides alike about a tile of columns.
#pragma once

#include <cmath>
#include <cstdint>

#include "hqq/core/host_device.hpp"

namespace hqq::core {

// Rows are summed in this many slots (row r in slot r % kRowSlots, then slot by slot), so that sums
// do not depend on the lane count.
inline constexpr int kRowSlots = 16;
inline constexpr int kBalanceRounds = 16;
// The search ends when deviations agree to 1 %, or after this many rounds that lower the imbalance
// by less than 1 %: most matrices need two rounds, and what the others gain is below the noise of
// quantization.
inline constexpr int kBalancePatience = 2;
inline constexpr float kBalanceTolerance = 0.01f;

// The first s of every row, from the sum of all squares: SINQ's clamped steps then start near 1.
HQQ_HD float overall_deviation(float square, std::int64_t numel) {
  const float deviation = std::sqrt(square / static_cast<float>(numel));
  return deviation > 1e-18f && deviation < 1e18f ? deviation : 1.0f;
}

// Standard deviation of a column; 0 for a constant one.
HQQ_HD float column_deviation(float sum, float square, std::int64_t rows) {
  const auto n = static_cast<float>(rows);
  const float variance = (square - sum * sum / n) / (rows > 1 ? n - 1.0f : 1.0f);
  return std::sqrt(variance < 0.0f ? 0.0f : variance);
}

// The factor t of a column after a round that left this deviation.
HQQ_HD float next_factor(float factor, float deviation) {
  if (!(deviation > 1e-8f)) return factor;
  return factor * (deviation < 0.5f ? 0.5f : deviation > 2.0f ? 2.0f : deviation);
}

// The factor as it is stored, relative to the mean of its tile; at least the smallest that float16
// holds, since weights are divided by it.
HQQ_HD float stored_factor(float factor, float inv_mean) {
  const float relative = factor * inv_mean;
  return relative < 0x1p-24f ? 0x1p-24f : relative;
}

// Smallest and largest of some deviations; rows and columns of zeros do not count.
struct Spread {
  float low = 3e38f;
  float high = 0.0f;
  HQQ_HD void add(float deviation) {
    if (deviation <= 1e-8f) return;
    if (deviation < low) low = deviation;
    if (high < deviation) high = deviation;
  }
  HQQ_HD float ratio() const { return high == 0.0f ? 1.0f : high / low; }
};

// What happens from round to round.
class BalanceSearch {
 public:
  // Whether the factors of this round are the best so far.
  HQQ_HD bool round(float columns, float rows) {
    const float imbalance = columns < rows ? rows : columns;
    stale_ = imbalance < best_ * (1.0f - kBalanceTolerance) ? 0 : stale_ + 1;
    ++rounds_;
    done_ = imbalance < 1.0f + kBalanceTolerance || rounds_ > kBalanceRounds ||
            stale_ == kBalancePatience;
    if (!(imbalance < best_)) return false;
    best_ = imbalance;
    return true;
  }
  HQQ_HD bool done() const { return done_; }
  HQQ_HD int rounds() const { return rounds_; }

 private:
  float best_ = 3e38f;
  int rounds_ = 0;
  int stale_ = 0;
  bool done_ = false;
};

}  // namespace hqq::core

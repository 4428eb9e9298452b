// How scales and zeros are stored in 8 bits: value = code * step + offset, with one pair for a
// block of groups.
#pragma once

#include <cmath>
#include <cstdint>

#include "hqq/core/host_device.hpp"

namespace hqq::core {

// Groups that share a step and an offset, in row-major order.
inline constexpr std::int64_t kMetadataBlock = 128;

struct MetadataStep {
  float step;
  float offset;
};

// The pair for n >= 1 values value(0), value(1), ...
template <class Value>
HQQ_HD MetadataStep metadata_step(const Value& value, std::int64_t n) {
  float low = value(0);
  float high = low;
  for (std::int64_t i = 1; i < n; ++i) {
    const float x = value(i);
    if (x < low) low = x;
    if (!(x < high)) high = x;
  }
  return {(high - low) / 255.0f, low};
}

HQQ_HD std::uint8_t metadata_code(float value, MetadataStep block) {
  const float inv_step = block.step > 0.0f ? 1.0f / block.step : 0.0f;
  const float code = std::rint((value - block.offset) * inv_step);
  // In this order a NaN, from values that overflow, becomes 0.
  const float bounded = code > 0.0f ? code : 0.0f;
  return static_cast<std::uint8_t>(bounded < 255.0f ? bounded : 255.0f);
}

HQQ_HD float metadata_value(std::uint8_t code, MetadataStep block) {
  return static_cast<float>(code) * block.step + block.offset;
}

// The zero that leaves the middle code where it was after storing has changed the scale.
HQQ_HD float refit_zero(float zero, float solved_scale, float stored_scale, float max_code) {
  if (!(stored_scale > 0.0f)) return zero;
  const float middle = 0.5f * max_code;
  return middle - (middle - zero) * (solved_scale / stored_scale);
}

}  // namespace hqq::core

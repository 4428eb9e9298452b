// The lane abstraction: everything in hqq::core is written for a type V that is `float` (scalar CPU
// code, one CUDA thread) or a SIMD vector of floats (src/cpu/lane-inl.h). One lane holds one whole
// group, so no operation crosses lanes and every instruction set adds in the same order.
//
// The headers below this one are compiled once per SIMD target, in the namespace
// hqq::core::HQQ_CORE_TARGET, hence the toggled include guards (the idiom of Highway's -inl.h
// headers).
#if defined(HQQ_CORE_LANE_TOGGLE) == defined(HWY_TARGET_TOGGLE)
#ifdef HQQ_CORE_LANE_TOGGLE
#undef HQQ_CORE_LANE_TOGGLE
#else
#define HQQ_CORE_LANE_TOGGLE
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#include "hqq/core/host_device.hpp"

#ifndef HQQ_CORE_TARGET
#define HQQ_CORE_TARGET scalar
#endif

// Lambdas do not inherit the target attribute of the function around them.
#ifndef HQQ_LAMBDA
#ifdef HWY_ATTR
#define HQQ_LAMBDA HWY_ATTR
#else
#define HQQ_LAMBDA
#endif
#endif

namespace hqq::core {
namespace HQQ_CORE_TARGET {

// Number of lanes of V; specialised for vectors.
template <class V>
struct LaneTraits;
template <>
struct LaneTraits<float> {
  static constexpr int kLanes = 1;
};

template <class V>
HQQ_HD V set(float x);
template <>
HQQ_HD float set<float>(float x) {
  return x;
}
template <class V>
HQQ_HD V load(const float* p);
template <>
HQQ_HD float load<float>(const float* p) {
  return *p;
}
HQQ_HD void store(float x, float* p) { *p = x; }

// The order of the operands is that of SSE: the second is returned when they compare equal.
HQQ_HD float min(float a, float b) { return a < b ? a : b; }
HQQ_HD float max(float a, float b) { return a > b ? a : b; }
HQQ_HD float abs(float x) { return std::fabs(x); }
// Half to even, the mode IEEE hardware starts in.
HQQ_HD float round(float x) { return std::rint(x); }
HQQ_HD float select(bool mask, float yes, float no) { return mask ? yes : no; }
HQQ_HD bool both(bool a, bool b) { return a && b; }
HQQ_HD bool any(bool mask) { return mask; }
HQQ_HD float sqrt(float x) { return std::sqrt(x); }
// An integral x in [0, 255] as a byte.
HQQ_HD void store_code(float x, std::uint8_t* p) {
  *p = static_cast<std::uint8_t>(static_cast<std::int32_t>(x));
}
template <class V>
HQQ_HD V load_code(const std::uint8_t* p);
template <>
HQQ_HD float load_code<float>(const std::uint8_t* p) {
  return static_cast<float>(*p);
}

HQQ_HD std::int32_t float_bits(float x) {
  std::int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
HQQ_HD float bits_float(std::int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
// For positive normal x = m * 2^e with m in [1, 2): returns e, stores m.
HQQ_HD float split_exponent(float x, float& mantissa) {
  const std::int32_t bits = float_bits(x);
  mantissa = bits_float((bits & 0x007FFFFF) | 0x3F800000);
  return static_cast<float>((bits >> 23) - 127);
}
// x * 2^k for an integral k that keeps the result normal.
HQQ_HD float scale_exponent(float x, float k) {
  return bits_float(float_bits(x) + (static_cast<std::int32_t>(k) << 23));
}

}  // namespace HQQ_CORE_TARGET
}  // namespace hqq::core

#endif  // per-target include guard

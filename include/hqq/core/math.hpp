// Rounding to 16-bit floats, powers, and the shrink operator. No libm: its results differ between
// machines; here every operation is an IEEE add, multiply or divide in a fixed order.
#if defined(HQQ_CORE_MATH_TOGGLE) == defined(HWY_TARGET_TOGGLE)
#ifdef HQQ_CORE_MATH_TOGGLE
#undef HQQ_CORE_MATH_TOGGLE
#else
#define HQQ_CORE_MATH_TOGGLE
#endif

#include "hqq/core/lane.hpp"
#include "hqq/core/params.hpp"

// With them a compiler reorders additions and takes NaN for impossible.
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "hqq needs IEEE arithmetic: compile without -ffast-math, -Ofast and -ffinite-math-only"
#endif

namespace hqq::core {
namespace HQQ_CORE_TARGET {

// float -> IEEE half bits, round half to even; overflow gives infinity, NaN stays NaN.
HQQ_HD std::uint16_t f32_to_f16_bits(float x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(float_bits(x));
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<std::uint16_t>(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return static_cast<std::uint16_t>(sign | 0x7C00u);  // >= 65520
  if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24
    // Adding 0.5 aligns the value so that the hardware rounds it to a multiple of 2^-24.
    const float aligned = bits_float(static_cast<std::int32_t>(magnitude)) + 0.5f;
    return static_cast<std::uint16_t>(
        sign | (static_cast<std::uint32_t>(float_bits(aligned)) - 0x3F000000u));
  }
  const std::uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xFFFu + odd) >> 13));
}

HQQ_HD float f16_bits_to_f32(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t magnitude = half & 0x7FFFu;
  if (magnitude >= 0x7C00u) {
    return bits_float(static_cast<std::int32_t>(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13)));
  }
  if (magnitude < 0x0400u) {  // subnormal: magnitude * 2^-24 is exact
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return sign != 0 ? -value : value;
  }
  return bits_float(static_cast<std::int32_t>(sign | ((magnitude << 13) + 0x38000000u)));
}

HQQ_HD std::uint16_t f32_to_bf16_bits(float x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(float_bits(x));
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

HQQ_HD float bf16_bits_to_f32(std::uint16_t half) {
  return bits_float(static_cast<std::int32_t>(static_cast<std::uint32_t>(half) << 16));
}

// The value that storing x as `type` leaves.
HQQ_HD float round_to(MetaType type, float x) {
  if (type == MetaType::kF16) return f16_bits_to_f32(f32_to_f16_bits(x));
  if (type == MetaType::kBF16) return bf16_bits_to_f32(f32_to_bf16_bits(x));
  return x;
}

// Works lane by lane; targets with conversion instructions have overloads in src/cpu/lane-inl.h.
template <class V>
HQQ_HD V round_to_lanes(MetaType type, V x) {
  if (type == MetaType::kF32) return x;
  alignas(64) float lanes[LaneTraits<V>::kLanes];
  store(x, lanes);
  for (float& lane : lanes) lane = round_to(type, lane);
  return load<V>(lanes);
}

// Smallest scale that is stored: below it, 1 / scale would overflow or the scale would round to 0.
HQQ_HD float min_scale(MetaType type) {
  return type == MetaType::kF16 ? 5.9604644775390625e-8f : 1.17549435e-38f;
}
// Largest |zero| with which (W_q - zero) still resolves codes.
HQQ_HD float max_zero(MetaType type) { return type == MetaType::kF16 ? 65504.0f : 16777216.0f; }

// log2 of a positive normal number; relative error below 1e-7 (Chebyshev fit of log2(1 + f) / f on
// [sqrt(1/2) - 1, sqrt(2) - 1], degree 8).
template <class V>
HQQ_HD V log2_positive(V x) {
  V m = set<V>(0.0f);
  V e = split_exponent(x, m);
  const auto high = set<V>(1.41421356f) < m;
  m = select(high, m * set<V>(0.5f), m);
  e = select(high, e + set<V>(1.0f), e);
  const V f = m - set<V>(1.0f);
  V p = set<V>(0.126148466f);
  p = p * f + set<V>(-0.207421035f);
  p = p * f + set<V>(0.215669859f);
  p = p * f + set<V>(-0.238920340f);
  p = p * f + set<V>(0.287918324f);
  p = p * f + set<V>(-0.360704828f);
  p = p * f + set<V>(0.480910610f);
  p = p * f + set<V>(-0.721347333f);
  p = p * f + set<V>(1.442695004f);
  return p * f + e;
}

// 2^x for |x| < 126 (Chebyshev fit of 2^f on [-1/2, 1/2], degree 6).
template <class V>
HQQ_HD V exp2_bounded(V x) {
  const V k = round(x);
  const V f = x - k;
  V p = set<V>(0.000154697320f);
  p = p * f + set<V>(0.00134004322f);
  p = p * f + set<V>(0.00961802560f);
  p = p * f + set<V>(0.0555032721f);
  p = p * f + set<V>(0.240226512f);
  p = p * f + set<V>(0.693147207f);
  p = p * f + set<V>(1.0f);
  return scale_exponent(p, k);
}

// x^y for x >= 0 and |y| <= 2; x below 1e-18 counts as 1e-18, which keeps 2^(y log2 x) normal.
template <class V>
HQQ_HD V pow_nonnegative(V x, float y) {
  return exp2_bounded(log2_positive(max(x, set<V>(1e-18f))) * set<V>(y));
}

// The generalised soft threshold of HQQ (Badri and Shaji, "Half-Quadratic Quantization of Large
// Machine Learning Models", 2023): sign(r) * relu(|r| - |r|^(p-1) / beta). It is 0 for |r| <=
// beta^(-1/(2-p)), which `threshold` bounds from below: most residuals need no power.
template <class V>
HQQ_HD V shrink(V r, float lp_norm, Shrinkage s) {
  const V magnitude = abs(r);
  const auto above = set<V>(s.threshold) < magnitude;
  if (!any(above)) return set<V>(0.0f);
  const V power = lp_norm == 1.0f ? set<V>(1.0f) : pow_nonnegative(magnitude, lp_norm - 1.0f);
  const V kept = max(magnitude - power * set<V>(s.inv_beta), set<V>(0.0f));
  return select(above, select(r < set<V>(0.0f), set<V>(0.0f) - kept, kept), set<V>(0.0f));
}

}  // namespace HQQ_CORE_TARGET
}  // namespace hqq::core

#endif  // per-target include guard

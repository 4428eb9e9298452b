// The lane operations of hqq::core for one SIMD target of Highway. Include after hwy/highway.h,
// before the core headers are used; per-target include guard.
#if defined(HQQ_CPU_LANE_TOGGLE) == defined(HWY_TARGET_TOGGLE)
#ifdef HQQ_CPU_LANE_TOGGLE
#undef HQQ_CPU_LANE_TOGGLE
#else
#define HQQ_CPU_LANE_TOGGLE
#endif

#include "hwy/highway.h"

// The core's templates must be compiled with the instructions of this target, hence inside the
// region.
#undef HQQ_CORE_TARGET
#define HQQ_CORE_TARGET HWY_NAMESPACE
HWY_BEFORE_NAMESPACE();
#include "hqq/core/lane.hpp"

namespace hqq::core {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using IntTag = hn::Rebind<std::int32_t, FloatTag>;
using Vector = hn::Vec<FloatTag>;
using VectorMask = hn::Mask<FloatTag>;

template <>
struct LaneTraits<Vector> {
  static constexpr int kLanes = static_cast<int>(hn::MaxLanes(FloatTag()));
};

template <>
HWY_INLINE Vector set<Vector>(float x) {
  return hn::Set(FloatTag(), x);
}
template <>
HWY_INLINE Vector load<Vector>(const float* p) {
  return hn::LoadU(FloatTag(), p);
}
HWY_INLINE void store(Vector x, float* p) { hn::StoreU(x, FloatTag(), p); }
HWY_INLINE Vector min(Vector a, Vector b) { return hn::Min(a, b); }
HWY_INLINE Vector max(Vector a, Vector b) { return hn::Max(a, b); }
HWY_INLINE Vector abs(Vector x) { return hn::Abs(x); }
HWY_INLINE Vector round(Vector x) { return hn::Round(x); }
HWY_INLINE Vector sqrt(Vector x) { return hn::Sqrt(x); }
HWY_INLINE Vector select(VectorMask mask, Vector yes, Vector no) {
  return hn::IfThenElse(mask, yes, no);
}
HWY_INLINE VectorMask both(VectorMask a, VectorMask b) { return hn::And(a, b); }
HWY_INLINE bool any(VectorMask mask) { return !hn::AllFalse(FloatTag(), mask); }

HWY_INLINE Vector split_exponent(Vector x, Vector& mantissa) {
  const auto bits = hn::BitCast(IntTag(), x);
  mantissa = hn::BitCast(FloatTag(), hn::Or(hn::And(bits, hn::Set(IntTag(), 0x007FFFFF)),
                                            hn::Set(IntTag(), 0x3F800000)));
  return hn::ConvertTo(FloatTag(), hn::Sub(hn::ShiftRight<23>(bits), hn::Set(IntTag(), 127)));
}
HWY_INLINE Vector scale_exponent(Vector x, Vector k) {
  const auto shifted = hn::ShiftLeft<23>(hn::ConvertTo(IntTag(), k));
  return hn::BitCast(FloatTag(), hn::Add(hn::BitCast(IntTag(), x), shifted));
}

HWY_INLINE void store_code(Vector x, std::uint8_t* p) {
  const hn::Rebind<std::uint8_t, FloatTag> bytes;
  hn::StoreU(hn::DemoteTo(bytes, hn::ConvertTo(IntTag(), x)), bytes, p);
}
template <>
HWY_INLINE Vector load_code<Vector>(const std::uint8_t* p) {
  const hn::Rebind<std::uint8_t, FloatTag> bytes;
  return hn::ConvertTo(FloatTag(), hn::PromoteTo(IntTag(), hn::LoadU(bytes, p)));
}

}  // namespace HWY_NAMESPACE
}  // namespace hqq::core

#include "hqq/core/math.hpp"

#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3
namespace hqq::core {
namespace HWY_NAMESPACE {

// F16C rounds half to even like f32_to_f16_bits.
template <>
HWY_INLINE Vector round_to_lanes<Vector>(MetaType type, Vector x) {
  if (type == MetaType::kF32) return x;
  if (type == MetaType::kF16) {
    const hn::Rebind<hwy::float16_t, FloatTag> halves;
    return hn::PromoteTo(FloatTag(), hn::DemoteTo(halves, x));
  }
  const hn::RebindToUnsigned<IntTag> words;
  const auto bits = hn::BitCast(words, x);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(words, 1));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(words, 0x7FFF)));
  return hn::BitCast(FloatTag(), hn::And(rounded, hn::Set(words, 0xFFFF0000u)));
}

}  // namespace HWY_NAMESPACE
}  // namespace hqq::core
#endif

#include "hqq/core/solver.hpp"
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

// The rows of a tile of the balancing (balance.hpp); a lane holds a row.
#if defined(HQQ_CORE_BALANCE_ROW_TOGGLE) == defined(HWY_TARGET_TOGGLE)
#ifdef HQQ_CORE_BALANCE_ROW_TOGGLE
#undef HQQ_CORE_BALANCE_ROW_TOGGLE
#else
#define HQQ_CORE_BALANCE_ROW_TOGGLE
#endif

#include "hqq/core/lane.hpp"

namespace hqq::core {
namespace HQQ_CORE_TARGET {

// One step of the scale s of a row.
template <class V>
struct RowStep {
  V scale;  // the new s
  V inv_scale;
  V deviation;  // std of the row of u / t / s, for the new s
};

// From sum and sum of squares of the row of u / t: s moves towards the deviation of the row, by at
// most a factor of 2.
template <class V>
HQQ_HD RowStep<V> balance_row(V sum, V square, std::int64_t cols, V old_scale) {
  const V zero = set<V>(0.0f);
  const V one = set<V>(1.0f);
  const V n = set<V>(static_cast<float>(cols));
  const V degrees = set<V>(static_cast<float>(cols > 1 ? cols - 1 : 1));
  const V deviation = sqrt(max((square - sum * sum / n) / degrees, zero));
  V step = min(max(deviation / old_scale, set<V>(0.5f)), set<V>(2.0f));
  step = select(zero < deviation, step, one);
  const V scale = old_scale * step;
  const V inv_scale = one / scale;
  return {scale, inv_scale, deviation * inv_scale};
}

}  // namespace HQQ_CORE_TARGET
}  // namespace hqq::core

#endif  // per-target include guard

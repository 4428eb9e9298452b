// The solvers: scale and zero of the groups in the lanes of V (docs/solver.md has the derivations).
//
// A group is given by two callables: w(i) returns its i-th weights, one a lane; h(i) the importance
// of their columns (UnitWeight: all 1). W_r = (q - zero) * scale, q = clamp(round(w / scale +
// zero)).
#if defined(HQQ_CORE_SOLVER_TOGGLE) == defined(HWY_TARGET_TOGGLE)
#ifdef HQQ_CORE_SOLVER_TOGGLE
#undef HQQ_CORE_SOLVER_TOGGLE
#else
#define HQQ_CORE_SOLVER_TOGGLE
#endif

#include "hqq/core/lane.hpp"
#include "hqq/core/math.hpp"
#include "hqq/core/params.hpp"

namespace hqq::core {
namespace HQQ_CORE_TARGET {

template <class V>
struct ScaleZero {
  V scale;
  V zero;
};

// Stands for "no importance": the products with it are not even emitted.
struct UnitWeight {};

template <class V, class H>
HQQ_HD V weighted(const H& h, std::int64_t i, V x) {
  return h(i) * x;
}
template <class V>
HQQ_HD V weighted(const UnitWeight&, std::int64_t, V x) {
  return x;
}

template <class V>
struct Range {
  V low;
  V high;
};

template <class V, class W>
HQQ_HD Range<V> group_range(const W& w, std::int64_t n) {
  Range<V> range{w(0), w(0)};
  for (std::int64_t i = 1; i < n; ++i) {
    range.low = min(w(i), range.low);
    range.high = max(w(i), range.high);
  }
  return range;
}

template <class V>
HQQ_HD V encode(V w, V inv_scale, V zero, V max_code) {
  return round(min(max(w * inv_scale + zero, set<V>(0.0f)), max_code));
}

// Scale and zero that reproduce a constant group exactly up to the rounding of |c|: q is 1 (c > 0)
// or 0.
template <class V>
HQQ_HD ScaleZero<V> constant_params(const SolverParams& params, V c) {
  const V zero = set<V>(0.0f);
  const V one = set<V>(1.0f);
  const V magnitude = abs(c);
  const V scale = select(
      magnitude == zero, one,
      max(round_to_lanes(params.scale_type, magnitude), set<V>(min_scale(params.scale_type))));
  return {scale, select(c < zero, one, zero)};
}

// A narrower group is a constant to what its scale is stored in.
template <class V>
HQQ_HD V least_width(const SolverParams& params) {
  return set<V>(min_scale(params.scale_type) * 0.5f);
}

// Round to nearest from the group's range, as stored. A group whose zero cannot be stored, because
// its range is tiny beside its mean, is represented as the constant in the middle of the range.
template <class V>
HQQ_HD ScaleZero<V> minmax_params(const SolverParams& params, Range<V> range) {
  const V width = range.high - range.low;
  const V smallest = set<V>(min_scale(params.scale_type));
  const V scale = max(round_to_lanes(params.scale_type, width / set<V>(params.max_code)), smallest);
  const V zero = round_to_lanes(params.zero_type, (set<V>(0.0f) - range.low) / scale);
  const ScaleZero<V> constant =
      constant_params(params, range.low * set<V>(0.5f) + range.high * set<V>(0.5f));
  const auto usable =
      both(least_width<V>(params) < width, abs(zero) < set<V>(max_zero(params.zero_type)));
  return {select(usable, scale, constant.scale), select(usable, zero, constant.zero)};
}

// Sums over a group for codes q: what the closed form of (scale, zero) needs.
template <class V>
struct Moments {
  V q, qq, qt;  // sum h q, sum h q^2, sum h q t; t is the target (w, or w - shrink(residual))
  V t, error;   // sum h t; sum h |w - W_r|^p, where asked for
};

// What a pass over the group computes besides the sums of q.
enum class Pass {
  kCodes,     // t = w, whose sum is known: q, qq, qt only
  kResidual,  // and the squared error of the given (scale, zero)
  kShrink,    // t = w - shrink(residual), and the p-norm error
};

template <Pass kPass, class V, class W, class H>
HQQ_HD void accumulate(const W& w, const H& h, std::int64_t i, V inv_scale, ScaleZero<V> sz,
                       V max_code, const SolverParams& params, Moments<V>& sums) {
  const V x = w(i);
  const V q = encode(x, inv_scale, sz.zero, max_code);
  const V hq = weighted(h, i, q);
  sums.q = sums.q + hq;
  sums.qq = sums.qq + hq * q;
  if constexpr (kPass == Pass::kCodes) {
    sums.qt = sums.qt + hq * x;
  } else {
    const V r = x - (q - sz.zero) * sz.scale;
    if constexpr (kPass == Pass::kResidual) {
      sums.qt = sums.qt + hq * x;
      sums.error = sums.error + weighted(h, i, r * r);
    } else {
      const V t = x - shrink(r, params.lp_norm, params.shrinkage);
      sums.qt = sums.qt + hq * t;
      sums.t = sums.t + weighted(h, i, t);
      sums.error = sums.error + weighted(h, i, pow_nonnegative(abs(r), params.lp_norm));
    }
  }
}

template <class V>
HQQ_HD Moments<V> add(const Moments<V>& a, const Moments<V>& b) {
  return {a.q + b.q, a.qq + b.qq, a.qt + b.qt, a.t + b.t, a.error + b.error};
}

// One pass. Two interleaved accumulators hide the latency of addition; their order is part of the
// result.
template <Pass kPass, class V, class W, class H>
HQQ_HD Moments<V> moments(const W& w, const H& h, std::int64_t n, ScaleZero<V> sz,
                          const SolverParams& params) {
  const V zero = set<V>(0.0f);
  const V inv_scale = set<V>(1.0f) / sz.scale;
  const V max_code = set<V>(params.max_code);
  const Moments<V> none{zero, zero, zero, zero, zero};
  Moments<V> total = none;
  for (std::int64_t begin = 0; begin < n; begin += kChunk) {
    const std::int64_t end = begin + kChunk < n ? begin + kChunk : n;
    Moments<V> even = none;
    Moments<V> odd = none;
    std::int64_t i = begin;
    for (; i + 2 <= end; i += 2) {
      accumulate<kPass>(w, h, i, inv_scale, sz, max_code, params, even);
      accumulate<kPass>(w, h, i + 1, inv_scale, sz, max_code, params, odd);
    }
    if (i < end) accumulate<kPass>(w, h, i, inv_scale, sz, max_code, params, even);
    total = add(total, add(even, odd));
  }
  return total;
}

// Where the search starts: the range clipped by some ratios, and the zero shifted by these
// fractions of a code (which weights share a code depends on the zero modulo 1). Measured in
// docs/solver.md.
inline constexpr int kNumShifts = 3;
inline constexpr float kZeroShift = 0.25f;  // -0.25, 0, 0.25

// Pass::kCodes for the three shifted zeros at once: they share w / scale.
template <class V, class W, class H>
HQQ_HD void shifted_moments(const W& w, const H& h, std::int64_t n, ScaleZero<V> sz,
                            const SolverParams& params, Moments<V> (&total)[kNumShifts]) {
  const V none = set<V>(0.0f);
  const V inv_scale = set<V>(1.0f) / sz.scale;
  const V max_code = set<V>(params.max_code);
  const V low = sz.zero - set<V>(kZeroShift);
  const V high = sz.zero + set<V>(kZeroShift);
  for (auto& t : total) t = {none, none, none, none, none};
  for (std::int64_t begin = 0; begin < n; begin += kChunk) {
    const std::int64_t end = begin + kChunk < n ? begin + kChunk : n;
    V q0 = none, q1 = none, q2 = none;
    V qq0 = none, qq1 = none, qq2 = none;
    V qt0 = none, qt1 = none, qt2 = none;
    for (std::int64_t i = begin; i < end; ++i) {
      const V x = w(i);
      const V u = x * inv_scale;
      const auto add_code = [&](V shifted, V& q, V& qq, V& qt) HQQ_LAMBDA {
        const V code = round(min(max(shifted, none), max_code));
        const V h_code = weighted(h, i, code);
        q = q + h_code;
        qq = qq + h_code * code;
        qt = qt + h_code * x;
      };
      add_code(u + low, q0, qq0, qt0);
      add_code(u + sz.zero, q1, qq1, qt1);
      add_code(u + high, q2, qq2, qt2);
    }
    total[0] = add(total[0], {q0, qq0, qt0, none, none});
    total[1] = add(total[1], {q1, qq1, qt1, none, none});
    total[2] = add(total[2], {q2, qq2, qt2, none, none});
  }
}

// The error of stored (scale, zero) in the norm of the solver.
template <class V, class W, class H>
HQQ_HD V group_error(const W& w, const H& h, std::int64_t n, ScaleZero<V> sz,
                     const SolverParams& params) {
  if (params.lp_norm == 2.0f) return moments<Pass::kResidual>(w, h, n, sz, params).error;
  return moments<Pass::kShrink>(w, h, n, sz, params).error;
}

// Sums that do not depend on the codes.
template <class V>
struct Totals {
  V h, w;  // sum h, sum h w
};

template <class V, class W, class H>
HQQ_HD Totals<V> totals(const W& w, const H& h, std::int64_t n) {
  const V zero = set<V>(0.0f);
  Totals<V> total{zero, zero};
  for (std::int64_t begin = 0; begin < n; begin += kChunk) {
    const std::int64_t end = begin + kChunk < n ? begin + kChunk : n;
    Totals<V> part{zero, zero};
    for (std::int64_t i = begin; i < end; ++i) {
      part.h = part.h + weighted(h, i, set<V>(1.0f));
      part.w = part.w + weighted(h, i, w(i));
    }
    total.h = total.h + part.h;
    total.w = total.w + part.w;
  }
  return total;
}

// Least squares of t over (scale, zero) for given codes: the slope of t against q and its
// intercept.
template <class V>
struct Fit {
  V scale;
  V mean_q;
  V mean_t;
  V gain;  // decrease of the squared error against the best constant: larger is better
  HQQ_HD V zero() const { return mean_q - mean_t / scale; }
};

template <class V>
HQQ_HD Fit<V> fit(const Moments<V>& m, V sum_h, V sum_t, V fallback_scale) {
  const V zero = set<V>(0.0f);
  const V mean_q = m.q / sum_h;
  const V var_q = m.qq - m.q * mean_q;
  const V cov = m.qt - mean_q * sum_t;
  // All codes equal, or a slope of the wrong sign: no information about the scale.
  const auto usable = both(zero < var_q, zero < cov);
  const V safe_var = select(usable, var_q, set<V>(1.0f));
  const V slope = cov / safe_var;
  return {select(usable, slope, fallback_scale), mean_q, sum_t / sum_h,
          select(usable, cov * slope, zero)};
}

// (scale, zero) of a fit as stored: the zero is refitted to the scale that rounding left.
template <class V>
HQQ_HD ScaleZero<V> stored(const SolverParams& params, const Fit<V>& f) {
  const V scale =
      max(round_to_lanes(params.scale_type, f.scale), set<V>(min_scale(params.scale_type)));
  return {scale, round_to_lanes(params.zero_type, f.mean_q - f.mean_t / scale)};
}

template <class V, class M>
HQQ_HD Fit<V> select_fit(M mask, const Fit<V>& a, const Fit<V>& b) {
  return {select(mask, a.scale, b.scale), select(mask, a.mean_q, b.mean_q),
          select(mask, a.mean_t, b.mean_t), select(mask, a.gain, b.gain)};
}

// The whole range, not rounded: what the searches below start from.
template <class V>
HQQ_HD ScaleZero<V> unrounded_range(const SolverParams& params, Range<V> range) {
  const V scale =
      max((range.high - range.low) / set<V>(params.max_code), set<V>(min_scale(MetaType::kF32)));
  return {scale, (set<V>(0.0f) - range.low) / scale};
}

// Squared error, up to 5 bits: the error of a refit follows from the sums, so a pass needs three of
// them.
template <class V, class W, class H>
HQQ_HD Fit<V> search_closed_form(const W& w, const H& h, std::int64_t n, Range<V> range,
                                 const Moments<V>& first, const SolverParams& params) {
  constexpr float kClipRatios[] = {0.96f, 0.88f, 0.80f};
  const Totals<V> sums = totals<V>(w, h, n);
  const ScaleZero<V> whole = unrounded_range(params, range);
  Fit<V> best = fit(first, sums.h, sums.w, whole.scale);
  for (float ratio : kClipRatios) {
    const ScaleZero<V> start{whole.scale * set<V>(ratio), whole.zero};
    Moments<V> starts[kNumShifts];
    shifted_moments(w, h, n, start, params, starts);
    for (const Moments<V>& m : starts) {
      const Fit<V> next = fit(m, sums.h, sums.w, start.scale);
      best = select_fit(best.gain < next.gain, next, best);
    }
  }
  Fit<V> current = best;
  for (int k = 0; k < params.iterations; ++k) {
    const ScaleZero<V> sz{current.scale, current.zero()};
    current = fit(moments<Pass::kCodes>(w, h, n, sz, params), sums.h, sums.w, current.scale);
    best = select_fit(best.gain < current.gain, current, best);
  }
  return best;
}

// Refits of the search below beyond params.iterations: no shifts are tried there, so each start
// needs more of them.
inline constexpr int kPreciseRefits = 4;

// This search sums the error of every candidate from its residuals: for 6 and 8 bits,
// where the closed form cancels, and for lp_norm < 2, where the target is w - shrink(residual).
template <class V, class W, class H>
HQQ_HD Fit<V> search_residual(const W& w, const H& h, std::int64_t n, Range<V> range,
                              const SolverParams& params) {
  constexpr float kPreciseRatios[] = {1.0f, 0.97f};
  const bool lp = params.lp_norm != 2.0f;
  const Totals<V> sums = totals<V>(w, h, n);
  const ScaleZero<V> whole = unrounded_range(params, range);
  Fit<V> best{whole.scale, whole.zero, set<V>(0.0f), set<V>(0.0f)};
  V best_error = set<V>(3.0e38f);
  for (float ratio : kPreciseRatios) {
    Fit<V> current{whole.scale * set<V>(ratio), whole.zero, set<V>(0.0f), set<V>(0.0f)};
    for (int k = 0; k <= params.iterations + kPreciseRefits; ++k) {
      const ScaleZero<V> sz{current.scale, current.zero()};
      const Moments<V> m = lp ? moments<Pass::kShrink>(w, h, n, sz, params)
                              : moments<Pass::kResidual>(w, h, n, sz, params);
      const auto better = m.error < best_error;
      best = select_fit(better, current, best);
      best_error = select(better, m.error, best_error);
      current = fit(m, sums.h, lp ? m.t : sums.w, current.scale);
    }
  }
  return best;
}

// Half-quadratic in both scale and zero; never worse, group by group, than minmax as stored.
template <class V, class W, class H>
HQQ_HD ScaleZero<V> solve_joint(const W& w, const H& h, std::int64_t n,
                                const SolverParams& params) {
  const Range<V> range = group_range<V>(w, n);
  const ScaleZero<V> baseline = minmax_params(params, range);
  V baseline_error = set<V>(0.0f);
  Fit<V> best{};
  if (params.precise || params.lp_norm != 2.0f) {
    baseline_error = group_error(w, h, n, baseline, params);
    best = search_residual(w, h, n, range, params);
  } else {
    const Moments<V> first = moments<Pass::kResidual>(w, h, n, baseline, params);
    baseline_error = first.error;
    best = search_closed_form(w, h, n, range, first, params);
  }
  const ScaleZero<V> candidate = stored(params, best);
  // Zeros in float32 are yet to be quantized to 8 bits, with those of other groups. That of a
  // constant group, at the smallest scale, is millions of codes away and would leave the others no
  // bits.
  const V least = params.zero_type == MetaType::kF32 ? least_width<V>(params) : set<V>(-1.0f);
  const auto usable = both(least < range.high - range.low,
                           abs(candidate.zero) < set<V>(max_zero(params.zero_type)));
  const auto better = both(group_error(w, h, n, candidate, params) < baseline_error, usable);
  return {select(better, candidate.scale, baseline.scale),
          select(better, candidate.zero, baseline.zero)};
}

template <class V, class W>
HQQ_HD ScaleZero<V> solve_minmax(const W& w, std::int64_t n, const SolverParams& params) {
  return minmax_params(params, group_range<V>(w, n));
}

// ---- hqq: upstream's solver (hqq 0.2.8, optimize_weights_proximal_legacy) ----

template <class V>
struct HqqState {
  V inv_scale;
  V zero;
};

// Upstream's start: no scale for a range up to 1e-4, at most 2e4.
template <class V, class W>
HQQ_HD HqqState<V> hqq_start(const W& w, std::int64_t n, const SolverParams& params) {
  const Range<V> range = group_range<V>(w, n);
  const V width = range.high - range.low;
  const V one = set<V>(1.0f);
  // torch computes max_code / width as max_code * (1 / width), and ties of 16-bit weights show it.
  V inv_scale = select(set<V>(1e-4f) < width, one / width * set<V>(params.max_code), one);
  inv_scale = min(inv_scale, set<V>(2e4f));
  const V zero = (set<V>(0.0f) - range.low) * inv_scale;
  return {inv_scale, params.round_zero ? round(zero) : zero};
}

// One step: codes, residual, shrink, and the (weighted) mean that is the new zero. Returns sum |w -
// W_r| of the state before the step.
template <class V, class W, class H>
HQQ_HD V hqq_step(const W& w, const H& h, std::int64_t n, const SolverParams& params,
                  Shrinkage shrinkage, HqqState<V>& state) {
  const V zero = set<V>(0.0f);
  const V scale = set<V>(1.0f) / state.inv_scale;
  const V max_code = set<V>(params.max_code);
  V error = zero;
  V sum = zero;
  V sum_h = zero;
  for (std::int64_t begin = 0; begin < n; begin += kChunk) {
    const std::int64_t end = begin + kChunk < n ? begin + kChunk : n;
    V part_error = zero;
    V part_sum = zero;
    V part_h = zero;
    for (std::int64_t i = begin; i < end; ++i) {
      const V x = w(i);
      const V q = encode(x, state.inv_scale, state.zero, max_code);
      const V r = x - (q - state.zero) * scale;
      const V target = x - shrink(r, params.lp_norm, shrinkage);
      part_error = part_error + abs(r);
      part_sum = part_sum + weighted(h, i, q - target * state.inv_scale);
      part_h = part_h + weighted(h, i, set<V>(1.0f));
    }
    error = error + part_error;
    sum = sum + part_sum;
    sum_h = sum_h + part_h;
  }
  state.zero = sum / sum_h;
  return error;
}

}  // namespace HQQ_CORE_TARGET
}  // namespace hqq::core

#endif  // per-target include guard

#include "src/cpu/quantize/solve.hpp"

#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/quantize/solve.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/cpu/dispatch.hpp"
#include "src/cpu/lane-inl.h"
#include "src/cpu/quantize/load-inl.h"

HWY_BEFORE_NAMESPACE();
namespace hqq::cpu {
namespace HWY_NAMESPACE {

namespace lanes = core::HWY_NAMESPACE;

// Weight i of the groups in the lanes.
template <class V>
struct TileWeights {
  const float* tile;
  HWY_INLINE V operator()(std::int64_t i) const {
    return lanes::load<V>(tile + i * lanes::LaneTraits<V>::kLanes);
  }
};

// Axis 1: the lanes are rows, so all of them have the same columns and one value serves all.
template <class V>
struct SharedImportance {
  const float* values;
  HWY_INLINE V operator()(std::int64_t i) const { return lanes::set<V>(values[i]); }
};

struct Buffers {
  std::vector<float> tile, scratch, importance;
};

// One value a lane, and of hqq one a step and lane.
template <class V>
struct LaneValues {
  static constexpr int kLanes = lanes::LaneTraits<V>::kLanes;
  float scale[kLanes];
  float zero[kLanes];
  float step_zero[kHqqBatch][kLanes];
  float step_error[kHqqBatch][kLanes];

  // group(l) is the group in lane l.
  template <class Group>
  HWY_INLINE void load(const SolveArgs& args, const Group& group) {
    if (args.step != SolveStep::kHqqSteps) return;
    for (int l = 0; l < kLanes; ++l) {
      scale[l] = args.scale[group(l)];
      zero[l] = args.zero[group(l)];
    }
  }
  template <class Group>
  HWY_INLINE void store(const SolveArgs& args, int count, const Group& group) const {
    for (int l = 0; l < count; ++l) {
      if (args.step != SolveStep::kHqqSteps) {
        args.scale[group(l)] = scale[l];
        args.zero[group(l)] = zero[l];
        continue;
      }
      const std::int64_t groups = args.source.layout.num_groups();
      for (int k = 0; k < kHqqBatch; ++k) {
        args.step_zero[k * groups + group(l)] = step_zero[k][l];
        args.step_error[k * groups + group(l)] = step_error[k][l];
      }
    }
  }
};

// Runs the step on one tile.
template <class V, class H>
HWY_INLINE void run_step(const SolveArgs& args, const H& h, const float* tile, std::int64_t n,
                         LaneValues<V>& values) {
  const TileWeights<V> w{tile};
  switch (args.step) {
    case SolveStep::kMinMax: {
      const auto sz = lanes::solve_minmax<V>(w, n, args.params);
      lanes::store(sz.scale, values.scale);
      lanes::store(sz.zero, values.zero);
      break;
    }
    case SolveStep::kJoint: {
      const auto sz = lanes::solve_joint<V>(w, h, n, args.params);
      lanes::store(sz.scale, values.scale);
      lanes::store(sz.zero, values.zero);
      break;
    }
    case SolveStep::kHqqStart: {
      const auto state = lanes::hqq_start<V>(w, n, args.params);
      lanes::store(state.inv_scale, values.scale);
      lanes::store(state.zero, values.zero);
      break;
    }
    case SolveStep::kHqqSteps: {
      lanes::HqqState<V> state{lanes::load<V>(values.scale), lanes::load<V>(values.zero)};
      for (int k = 0; k < kHqqBatch; ++k) {
        const V error = lanes::hqq_step<V>(w, h, n, args.params, args.shrinkages[k], state);
        lanes::store(error, values.step_error[k]);
        lanes::store(state.zero, values.step_zero[k]);
      }
      break;
    }
  }
}

// Axis 1: `count` rows from `row` on, group gi of each. Lanes past `count` repeat the last row.
template <class V>
HWY_NOINLINE void solve_rows(const SolveArgs& args, std::int64_t row, int count, std::int64_t gi,
                             Buffers& buffers) {
  const core::GroupLayout& layout = args.source.layout;
  const std::int64_t col = gi * layout.group_size;
  const std::int64_t n = layout.length_in_row(gi);
  const std::int64_t per_row = layout.groups_per_row();
  const auto group = [=](int l) { return (row + (l < count ? l : count - 1)) * per_row + gi; };
  load_row_tile(args.source, row, col, n, lanes::LaneTraits<V>::kLanes, buffers.scratch.data(),
                buffers.tile.data());
  LaneValues<V> values{};  // which of the arrays count depends on the step
  values.load(args, group);
  if (args.source.importance == nullptr) {
    run_step<V>(args, lanes::UnitWeight{}, buffers.tile.data(), n, values);
  } else {
    run_step<V>(args, SharedImportance<V>{args.source.importance + col}, buffers.tile.data(), n,
                values);
  }
  values.store(args, count, group);
}

// Axis 0: groups j .. j + count - 1, all of n weights. Lanes past `count` repeat the last group.
template <class V>
HWY_NOINLINE void solve_strided(const SolveArgs& args, std::int64_t j, int count, std::int64_t n,
                                Buffers& buffers) {
  const auto group = [=](int l) { return j + (l < count ? l : count - 1); };
  load_strided_tile(args.source, j, count, n, lanes::LaneTraits<V>::kLanes, buffers.tile.data(),
                    args.source.importance, buffers.importance.data());
  LaneValues<V> values{};  // which of the arrays count depends on the step
  values.load(args, group);
  if (args.source.importance == nullptr) {
    run_step<V>(args, lanes::UnitWeight{}, buffers.tile.data(), n, values);
  } else {
    run_step<V>(args, TileWeights<V>{buffers.importance.data()}, buffers.tile.data(), n, values);
  }
  values.store(args, count, group);
}

template <class V>
HWY_INLINE void solve_unit_lanes(const SolveArgs& args, std::int64_t unit) {
  constexpr int kLanes = lanes::LaneTraits<V>::kLanes;
  const core::GroupLayout& layout = args.source.layout;
  // Reused between units: a thread solves thousands of them.
  thread_local Buffers buffers;
  const auto size = static_cast<std::size_t>(layout.group_size * kLanes);
  // Each for itself: memory may have run out between them.
  for (auto* v : {&buffers.tile, &buffers.scratch, &buffers.importance}) {
    if (v->size() < size) v->resize(size);
  }
  if (layout.axis == 1) {
    const std::int64_t begin = unit * kUnitRows;
    const std::int64_t end = begin + kUnitRows < layout.rows ? begin + kUnitRows : layout.rows;
    for (std::int64_t gi = 0; gi < layout.groups_per_row(); ++gi) {
      for (std::int64_t row = begin; row < end; row += kLanes) {
        const auto count = static_cast<int>(end - row < kLanes ? end - row : kLanes);
        solve_rows<V>(args, row, count, gi, buffers);
      }
    }
    return;
  }
  const std::int64_t groups = layout.num_groups();
  const std::int64_t begin = unit * kUnitGroups;
  const std::int64_t end = begin + kUnitGroups < groups ? begin + kUnitGroups : groups;
  for (std::int64_t j = begin; j < end;) {
    const std::int64_t n = layout.strided_length(j);
    int count = 1;
    // Lanes of one tile have equal lengths; lengths change once, where the tails begin.
    while (count < kLanes && j + count < end && layout.strided_length(j + count) == n) ++count;
    solve_strided<V>(args, j, count, n, buffers);
    j += count;
  }
}

void solve_unit_simd(const SolveArgs& args, std::int64_t unit) {
  solve_unit_lanes<lanes::Vector>(args, unit);
}

#if HWY_TARGET == HWY_STATIC_TARGET
void solve_unit_simd_scalar(const SolveArgs& args, std::int64_t unit) {
  solve_unit_lanes<float>(args, unit);
}
#endif

}  // namespace HWY_NAMESPACE
}  // namespace hqq::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace hqq::cpu {

HWY_EXPORT(solve_unit_simd);

void solve_unit(const SolveArgs& args, std::int64_t unit) {
  HQQ_DISPATCH(solve_unit_simd)(args, unit);
}

}  // namespace hqq::cpu
#endif  // HWY_ONCE

// Scale and zero of every group.
#pragma once

#include <cstdint>

#include "hqq/core/params.hpp"
#include "src/cpu/group_source.hpp"

namespace hqq::cpu {

enum class SolveStep {
  kMinMax,
  kJoint,
  kHqqStart,  // writes the initial 1 / scale and zero
  kHqqSteps,  // kHqqBatch iterations on them
};

// Iterations of hqq that run on a tile of weights while it is in the cache. Whether to stop is known
// only when all groups have taken a step, so up to kHqqBatch - 1 are wasted; reading the weights from
// memory each time costs more.
inline constexpr int kHqqBatch = 5;

struct SolveArgs {
  GroupSource source;
  SolveStep step = SolveStep::kJoint;
  core::SolverParams params;
  float* scale = nullptr;  // [num_groups]; 1 / scale for the two hqq steps
  float* zero = nullptr;   // [num_groups]; kHqqSteps only reads it
  // kHqqSteps, both [kHqqBatch, num_groups]: the zero after each step, and sum |w - W_r| before it.
  float* step_zero = nullptr;
  float* step_error = nullptr;
};

// Solves the groups of one unit (kUnitRows rows or kUnitGroups strided groups).
void solve_unit(const SolveArgs& args, std::int64_t unit);

}  // namespace hqq::cpu

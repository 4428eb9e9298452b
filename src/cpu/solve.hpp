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
  kHqqStep,   // one iteration on them; error[g] = sum |w - W_r| of group g before it
};

struct SolveArgs {
  GroupSource source;
  SolveStep step = SolveStep::kJoint;
  core::SolverParams params;
  float* scale = nullptr;  // [num_groups]; 1 / scale for the two hqq steps
  float* zero = nullptr;   // [num_groups]
  float* error = nullptr;  // [num_groups], kHqqStep only
};

// Solves the groups of one unit (kUnitRows rows or kUnitGroups strided groups).
void solve_unit(const SolveArgs& args, std::int64_t unit);

}  // namespace hqq::cpu

// Scale and zero of every group.
#pragma once

#include <cstdint>

#include "hqq/core/params.hpp"
#include "src/cpu/quantize/group_source.hpp"

namespace hqq::cpu {

using core::kHqqBatch;
using core::SolveStep;

struct SolveArgs {
  GroupSource source;
  SolveStep step = SolveStep::kJoint;
  core::SolverParams params;
  float* scale = nullptr;  // [num_groups]; 1 / scale for the two hqq steps
  float* zero = nullptr;   // [num_groups]; kHqqSteps only reads it
  // kHqqSteps, [kHqqBatch].
  const core::Shrinkage* shrinkages = nullptr;
  // kHqqSteps, both [kHqqBatch, num_groups]: the zero after each step, and sum |w - W_r| before it.
  float* step_zero = nullptr;
  float* step_error = nullptr;
};

// Solves the groups of one unit (kUnitRows rows or kUnitGroups strided groups).
void solve_unit(const SolveArgs& args, std::int64_t unit);

}  // namespace hqq::cpu

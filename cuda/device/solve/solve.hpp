// Scale and zero of every group: a thread a group, with the arithmetic of hqq::core.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/device/solve/encode.hpp"
#include "cuda/device/solve/store.hpp"
#include "cuda/device/solve/weights.hpp"
#include "hqq/core/solver.hpp"

namespace hqq::cuda::device {

using core::kHqqBatch;
using core::SolveStep;

// What the blocks of hqq tell each other.
struct HqqProgress {
  double best;  // error of the step before
  int done;
  int last;  // step of the last batch that counts
};

struct HqqBuffers {
  float* step_zero = nullptr;     // [kHqqBatch, groups]: the zero after each step
  float* step_error = nullptr;    // [kHqqBatch, groups]: sum |w - W_r| before it
  double* block_error = nullptr;  // [kHqqBatch, error blocks]
  HqqProgress* progress = nullptr;
};

struct SolveArgs {
  TileArgs tile;
  core::SolverParams params;
  float* scale = nullptr;  // [groups] as solved; 1 / scale for the hqq steps
  float* zero = nullptr;
  HqqBuffers hqq{};
  bool first_batch = true;  // of kHqqSteps
  core::Shrinkage shrinkages[kHqqBatch]{};
  // Where the same kernel stores and encodes: W_q is not null.
  MetadataTarget stored_scale{}, stored_zero{};
  PackedRows packed{};
  float small_scale = 0.0f;
  QuantizeProblems* problems = nullptr;
};

// Stores the group's scale and zero, and its codes from them as stored.
template <class Weights>
__device__ inline void finish_group(const SolveArgs& args, std::int64_t group, std::int64_t n,
                                    const Weights& weights, core::scalar::ScaleZero<float> sz) {
  const core::GroupLayout& layout = args.tile.layout;
  const float scale =
      write_float(args.stored_scale.type, args.stored_scale.values, group, sz.scale);
  const float zero = write_float(args.stored_zero.type, args.stored_zero.values, group, sz.zero);
  check_scale(args.problems, scale, args.small_scale, group);
  check_stored(args.problems, zero, group);
  const std::int64_t row = group / layout.groups_per_row();
  const std::int64_t col = group % layout.groups_per_row() * layout.group_size;
  encode_group(args.packed, row, col, n, weights,
               {1.0f / scale, zero, static_cast<float>(args.packed.format.max_code)});
}

template <class Weights, class Importance>
__device__ inline void hqq_steps(const SolveArgs& args, std::int64_t group, std::int64_t n,
                                 const Weights& weights, const Importance& importance) {
  const std::int64_t groups = args.tile.layout.num_groups();
  const float* zero = args.first_batch ? args.zero : args.hqq.step_zero + (kHqqBatch - 1) * groups;
  core::scalar::HqqState<float> state{ld_global(args.scale + group), ld_global(zero + group)};
#pragma unroll 1
  for (int k = 0; k < kHqqBatch; ++k) {
    const float error = core::scalar::hqq_step<float>(weights, importance, n, args.params,
                                                      args.shrinkages[k], state);
    st_global(args.hqq.step_error + k * groups + group, error);
    st_global(args.hqq.step_zero + k * groups + group, state.zero);
  }
}

// kWeighted: with importance; kShared: GroupTile::used.
template <SolveStep kStep, bool kWeighted, bool kShared>
__global__ void solve_kernel(const SolveArgs args) {
  const std::int64_t group = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if constexpr (kStep == SolveStep::kHqqSteps) {
    if (!args.first_batch && ld_global(&args.hqq.progress->done) != 0) return;
  }
  if constexpr (kShared) {
    load_tile(args.tile, kWeighted);
    __syncthreads();
  }
  if (group >= args.tile.layout.num_groups()) return;
  const std::int64_t n = group_length(args.tile.layout, group);
  const auto weights = group_weights<kShared>(args.tile, group);
  const auto importance = [&] {
    if constexpr (kWeighted)
      return group_importance<kShared>(args.tile, group);
    else
      return core::scalar::UnitWeight{};
  }();
  if constexpr (kStep == SolveStep::kHqqSteps) {
    hqq_steps(args, group, n, weights, importance);
  } else if constexpr (kStep == SolveStep::kHqqStart) {
    const auto state = core::scalar::hqq_start<float>(weights, n, args.params);
    st_global(args.scale + group, state.inv_scale);
    st_global(args.zero + group, state.zero);
  } else {
    core::scalar::ScaleZero<float> sz{};
    if constexpr (kStep == SolveStep::kMinMax) {
      sz = core::scalar::solve_minmax<float>(weights, n, args.params);
    } else {
      sz = core::scalar::solve_joint<float>(weights, importance, n, args.params);
    }
    if (args.packed.W_q != nullptr) return finish_group(args, group, n, weights, sz);
    st_global(args.scale + group, sz.scale);
    st_global(args.zero + group, sz.zero);
  }
}

// Errors of each step of a batch over one block of groups; a thread a block and step.
static __global__ void hqq_sum_kernel(HqqBuffers hqq, std::int64_t groups, bool first_batch) {
  if (!first_batch && ld_global(&hqq.progress->done) != 0) return;
  const std::int64_t blocks = (groups + core::kErrorBlock - 1) / core::kErrorBlock;
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= blocks * kHqqBatch) return;
  const std::int64_t begin = thread % blocks * core::kErrorBlock;
  const std::int64_t end = begin + core::kErrorBlock < groups ? begin + core::kErrorBlock : groups;
  const float* errors = hqq.step_error + thread / blocks * groups;
  double sum = 0.0;
  for (std::int64_t g = begin; g < end; ++g) sum += static_cast<double>(ld_global(errors + g));
  st_global(hqq.block_error + thread, sum);
}

// One block of kHqqBatch threads: adds the blocks and decides, as upstream does, by the mean error
// of the whole matrix. It keeps the zero of the step that stopped it.
static __global__ void hqq_decide_kernel(HqqBuffers hqq, std::int64_t groups, int steps_before,
                                         int iterations) {
  const bool first_batch = steps_before == 0;
  if (!first_batch && ld_global(&hqq.progress->done) != 0) return;
  const std::int64_t blocks = (groups + core::kErrorBlock - 1) / core::kErrorBlock;
  auto* totals = reinterpret_cast<double*>(simt::shared_memory());
  double total = 0.0;
  for (std::int64_t b = 0; b < blocks; ++b) {
    total += ld_global(hqq.block_error + threadIdx.x * blocks + b);
  }
  simt::st_shared(totals + threadIdx.x, total);
  __syncthreads();
  if (threadIdx.x != 0) return;
  double best = first_batch ? INFINITY : ld_global(&hqq.progress->best);
  int done = 0;
  int last = 0;
  for (int k = 0; k < kHqqBatch && done == 0; ++k) {
    const double next = simt::ld_shared(totals + k);
    done = next >= best || steps_before + k + 1 == iterations ? 1 : 0;
    best = next;
    last = k;
  }
  st_global(&hqq.progress->best, best);
  st_global(&hqq.progress->done, done);
  st_global(&hqq.progress->last, last);
}

static __global__ void hqq_finish_kernel(HqqBuffers hqq, std::int64_t groups, float* scale,
                                         float* zero) {
  const std::int64_t group = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (group >= groups) return;
  const std::int64_t last = ld_global(&hqq.progress->last);
  st_global(scale + group, 1.0f / ld_global(scale + group));
  st_global(zero + group, ld_global(hqq.step_zero + last * groups + group));
}

}  // namespace hqq::cuda::device

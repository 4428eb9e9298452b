#include <algorithm>

#include "cuda/device/solve/balance.hpp"
#include "cuda/device/solve/encode.hpp"
#include "cuda/device/solve/errors.hpp"
#include "cuda/device/solve/solve.hpp"
#include "cuda/device/solve/store.hpp"
#include "cuda/launch.hpp"
#include "cuda/quantize.hpp"
#include "cuda/tiles.hpp"

namespace hqq::cuda {
namespace {

constexpr unsigned kThreads = 256;
// Shared memory that a block of solve_kernel takes: three blocks fit a multiprocessor of sm_80 and
// sm_90.
constexpr std::size_t kTileBytes = 72 * 1024;
// Shared memory of a block of balance_kernel: there are about as many blocks as multiprocessors.
constexpr std::size_t kBalanceBytes = 160 * 1024;

dim3 blocks_of(std::int64_t threads, unsigned per_block = kThreads) {
  return dim3(static_cast<unsigned>(div_up(threads, per_block)));
}

bool has_bytes(const DeviceMatrix& q) {
  return q.scale_type == DType::kU8 || q.zero_type == DType::kU8;
}

// minmax has no use for it.
bool uses_importance(const QuantizeArgs& args) {
  return args.importance != nullptr && args.solver != SolverKind::kMinMax;
}

// Whether W is not what GroupTile::weights wants.
bool needs_copy(const QuantizeArgs& args) {
  const core::GroupLayout& layout = args.out.layout;
  return args.balance || args.W_type != DType::kF32 || args.row_stride != layout.cols ||
         layout.axis == 1;
}

// How the groups of a block are held, and how many there are.
struct TileShape {
  device::GroupTile tile;
  unsigned threads = 0;
  std::size_t shared_bytes = 0;
};

TileShape tile_shape(const QuantizeArgs& args) {
  const core::GroupLayout& layout = args.out.layout;
  const std::size_t most = current_device().max_shared_bytes;
  TileShape shape;
  shape.tile.length =
      layout.axis == 1 ? std::min(layout.group_size, layout.cols) | 1 : layout.group_size;
  const std::int64_t areas = uses_importance(args) ? 2 : 1;
  for (unsigned threads : {128u, 64u, 32u}) {
    shape.threads = threads;
    shape.shared_bytes =
        static_cast<std::size_t>(areas * threads * shape.tile.length) * sizeof(float);
    if (shape.shared_bytes <= std::min(kTileBytes, most)) return shape;
  }
  // One warp a multiprocessor still beats reading each weight a dozen times from far away.
  if (shape.shared_bytes <= most) return shape;
  shape.tile.used = false;
  shape.shared_bytes = 0;
  return shape;
}

// Whether one kernel solves, stores and encodes. A thread then packs the codes of its group alone,
// so that groups must begin where blocks of codes do.
bool is_fused(const QuantizeArgs& args, const TileShape& shape) {
  const core::GroupLayout& layout = args.out.layout;
  const int block = core::row_format(args.out.width).block;
  return args.solver != SolverKind::kHqq && shape.tile.used && !has_bytes(args.out) &&
         layout.axis == 1 && (layout.group_size % block == 0 || layout.groups_per_row() == 1);
}

// Parts of a piece of memory, one after the other; without memory: how large it must be.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}
  template <class T>
  T* take(std::int64_t count) {
    auto* part = reinterpret_cast<T*>(memory_ + used_);
    used_ += static_cast<std::size_t>(
        round_up(count * static_cast<std::int64_t>(sizeof(T)), std::int64_t{256}));
    return part;
  }
  std::size_t used() const { return used_; }

 private:
  unsigned char* memory_;
  std::size_t used_ = 0;
};

// All that a call needs besides its result; null where it does not.
struct Buffers {
  float* inv_col_scale = nullptr;
  float* column_weights = nullptr;
  float* row_scale = nullptr;
  float* copy = nullptr;
  float* scale = nullptr;
  float* zero = nullptr;
  device::HqqBuffers hqq;
  core::ErrorSums* errors = nullptr;

  Buffers(const QuantizeArgs& args, const TileShape& shape, Workspace& workspace) {
    const core::GroupLayout& layout = args.out.layout;
    const std::int64_t groups = layout.num_groups();
    if (args.balance) {
      inv_col_scale = workspace.take<float>(layout.cols);
      if (uses_importance(args)) column_weights = workspace.take<float>(layout.cols);
      const std::int64_t tiles = div_up(layout.cols, core::balance_tile_cols(layout));
      row_scale = workspace.take<float>(tiles * layout.rows);
    }
    if (!shape.tile.used && needs_copy(args)) {
      const std::int64_t longest = std::min(layout.group_size, layout.cols);
      copy = workspace.take<float>(layout.axis == 1 ? groups * longest : layout.numel());
    }
    if (!is_fused(args, shape)) {
      scale = workspace.take<float>(groups);
      zero = workspace.take<float>(groups);
    }
    if (args.solver == SolverKind::kHqq) {
      hqq.step_zero = workspace.take<float>(groups * core::kHqqBatch);
      hqq.step_error = workspace.take<float>(groups * core::kHqqBatch);
      hqq.block_error = workspace.take<double>(div_up(groups, core::kErrorBlock) * core::kHqqBatch);
      hqq.progress = workspace.take<device::HqqProgress>(1);
    }
    if (args.errors != nullptr) {
      errors = workspace.take<core::ErrorSums>(div_up(layout.numel(), device::kErrorSpan));
    }
  }
};

void balance(const QuantizeArgs& args, const device::WeightSource& source, const Buffers& buffers,
             StreamHandle stream) {
  const core::GroupLayout& layout = args.out.layout;
  const std::int64_t tile_cols = core::balance_tile_cols(layout);
  const std::size_t limit = std::min(kBalanceBytes, current_device().max_shared_bytes);
  device::BalanceAreas areas{tile_cols, device::kBalanceThreads};
  const auto bytes = [&] { return static_cast<std::size_t>(areas.size()) * sizeof(float); };
  while (areas.panel_rows > core::kRowSlots && bytes() > limit) areas.panel_rows -= core::kRowSlots;
  const device::BalanceArgs balance_args{source,
                                         layout.rows,
                                         tile_cols,
                                         static_cast<int>(areas.panel_rows),
                                         buffers.row_scale,
                                         args.out.col_scale_type,
                                         args.out.col_scale};
  launch(
      device::balance_kernel,
      {blocks_of(layout.cols, static_cast<unsigned>(tile_cols)), device::kBalanceThreads, bytes()},
      stream, balance_args);
  launch(device::columns_kernel, {blocks_of(layout.cols), kThreads}, stream,
         args.out.col_scale_type, args.out.col_scale, layout.cols,
         buffers.column_weights == nullptr ? nullptr : args.importance, buffers.inv_col_scale,
         buffers.column_weights);
}

template <core::SolveStep kStep>
void launch_solve(const device::SolveArgs& args, const TileShape& shape, StreamHandle stream) {
  // minmax and the start of hqq have no use for importance.
  constexpr bool kUsesImportance =
      kStep == core::SolveStep::kJoint || kStep == core::SolveStep::kHqqSteps;
  const LaunchShape grid{blocks_of(args.tile.layout.num_groups(), shape.threads), shape.threads,
                         shape.shared_bytes};
  const auto run = [&](auto kernel_shared, auto kernel_global) {
    launch(shape.tile.used ? kernel_shared : kernel_global, grid, stream, args);
  };
  if (kUsesImportance && args.tile.importance != nullptr) {
    run(device::solve_kernel<kStep, kUsesImportance, true>,
        device::solve_kernel<kStep, kUsesImportance, false>);
  } else {
    run(device::solve_kernel<kStep, false, true>, device::solve_kernel<kStep, false, false>);
  }
}

// Upstream's loop: all groups take a batch of steps, and the error of the whole matrix decides
// which was the last. Batches after it return at once.
void solve_hqq(device::SolveArgs args, const core::Shrinkage* shrinkages, const TileShape& shape,
               StreamHandle stream) {
  const std::int64_t groups = args.tile.layout.num_groups();
  const std::int64_t sums = div_up(groups, core::kErrorBlock) * core::kHqqBatch;
  launch_solve<core::SolveStep::kHqqStart>(args, shape, stream);
  for (int steps = 0; steps < args.params.iterations; steps += core::kHqqBatch) {
    args.first_batch = steps == 0;
    std::copy_n(shrinkages + steps, core::kHqqBatch, args.shrinkages);
    launch_solve<core::SolveStep::kHqqSteps>(args, shape, stream);
    launch(device::hqq_sum_kernel, {blocks_of(sums), kThreads}, stream, args.hqq, groups,
           args.first_batch);
    launch(device::hqq_decide_kernel, {1, core::kHqqBatch, core::kHqqBatch * sizeof(double)},
           stream, args.hqq, groups, steps, args.params.iterations);
  }
  launch(device::hqq_finish_kernel, {blocks_of(groups), kThreads}, stream, args.hqq, groups,
         args.scale, args.zero);
}

void store_and_encode(const QuantizeArgs& args, const device::EncodeArgs& encode,
                      const Buffers& buffers, StreamHandle stream) {
  const core::GroupLayout& layout = args.out.layout;
  device::StoreArgs store{device::scale_target(args.out), device::zero_target(args.out)};
  store.groups = layout.num_groups();
  store.groups_per_thread = has_bytes(args.out) ? core::kMetadataBlock : 1;
  store.max_code = args.params.max_code;
  store.small_scale = args.small_scale;
  store.solved_scale = buffers.scale;
  store.solved_zero = buffers.zero;
  store.problems = args.problems;
  launch(device::store_kernel, {blocks_of(div_up(store.groups, store.groups_per_thread)), kThreads},
         stream, store);
  launch(device::encode_kernel,
         {blocks_of(layout.rows * div_up(layout.cols, encode.out.format.block)), kThreads}, stream,
         encode);
}

void sum_errors(const QuantizeArgs& args, const device::EncodeArgs& encode, const Buffers& buffers,
                StreamHandle stream) {
  const std::int64_t blocks = div_up(args.out.layout.numel(), device::kErrorSpan);
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), device::kErrorThreads,
                          device::kErrorThreads * sizeof(core::ErrorSums)};
  launch(device::errors_kernel, shape, stream,
         device::ErrorArgs{encode, args.out.col_scale_type,
                           args.balance ? args.out.col_scale : nullptr, buffers.errors});
  launch(device::sum_errors_kernel, {1, shape.block, shape.shared_bytes}, stream, buffers.errors,
         blocks, args.errors);
}

}  // namespace

std::size_t quantize_workspace_bytes(const QuantizeArgs& args) {
  Workspace workspace(nullptr);
  const Buffers buffers(args, tile_shape(args), workspace);
  return workspace.used();
}

void quantize(const QuantizeArgs& args, StreamHandle stream) {
  require_packing(args.out, Packing::kFormat1);
  const core::GroupLayout& layout = args.out.layout;
  TileShape shape = tile_shape(args);
  Workspace workspace(args.workspace);
  const Buffers buffers(args, shape, workspace);
  if (workspace.used() > args.workspace_bytes) {
    throw Failure(Status::kInvalidCall, "[quantize] the workspace has " +
                                            std::to_string(args.workspace_bytes) +
                                            " bytes; quantize_workspace_bytes() says " +
                                            std::to_string(workspace.used()));
  }

  device::WeightSource source{args.W, args.W_type, layout.cols, args.row_stride};
  const float* importance = uses_importance(args) ? args.importance : nullptr;
  if (args.balance) {
    balance(args, source, buffers, stream);
    source.inv_col_scale = buffers.inv_col_scale;
    if (importance != nullptr) importance = buffers.column_weights;
  }
  if (!shape.tile.used) shape.tile.weights = static_cast<const float*>(args.W);
  if (buffers.copy != nullptr) {
    launch(device::copy_weights_kernel, {blocks_of(layout.numel()), kThreads}, stream, source,
           layout, buffers.copy);
    shape.tile.weights = buffers.copy;
  }

  const device::PackedRows packed{args.out.W_q, args.out.row_bytes,
                                  core::row_format(args.out.width)};
  const bool fused = is_fused(args, shape);
  device::SolveArgs solve{{source, layout, importance, shape.tile, fused ? args.problems : nullptr},
                          args.params,
                          buffers.scale,
                          buffers.zero,
                          buffers.hqq};
  if (fused) {
    solve.stored_scale = device::scale_target(args.out);
    solve.stored_zero = device::zero_target(args.out);
    solve.packed = packed;
    solve.small_scale = args.small_scale;
    solve.problems = args.problems;
  }
  if (args.solver == SolverKind::kMinMax)
    launch_solve<core::SolveStep::kMinMax>(solve, shape, stream);
  if (args.solver == SolverKind::kJoint)
    launch_solve<core::SolveStep::kJoint>(solve, shape, stream);
  if (args.solver == SolverKind::kHqq) solve_hqq(solve, args.shrinkages, shape, stream);

  const device::EncodeArgs encode{
      source, layout, device::scale_of(args.out), device::zero_of(args.out), packed, args.problems};
  if (!fused) store_and_encode(args, encode, buffers, stream);
  if (args.errors != nullptr) sum_errors(args, encode, buffers, stream);
}

}  // namespace hqq::cuda

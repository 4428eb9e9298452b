#include <algorithm>
#include <bit>
#include <map>
#include <string>
#include <tuple>

#include "cuda/device/decode.hpp"
#include "cuda/device/gemm.hpp"
#include "cuda/linear.hpp"
#include "cuda/linear_kernels.hpp"

namespace hqq::cuda {
namespace {

using device::kTileCols;
using device::kTileRows;
using device::LinearParams;

constexpr std::int64_t kVector = 8;  // 16-bit values in 16 bytes

bool is_decode(const LinearPlan& plan) { return plan.kernel != LinearKernel::kGemm; }

int bits_of(const FusedMatrix& weight) { return device::tile_planes(weight.width).bits(); }

// gemm_kernel copies x by 16 bytes.
bool x_needs_preparing(const FusedLinearArgs& args) {
  return args.weight.col_scale != nullptr || args.weight.layout.cols % kVector != 0 ||
         args.x_stride % kVector != 0 || reinterpret_cast<std::uintptr_t>(args.x) % 16 != 0;
}

struct Workspace {
  std::size_t partials = 0, x = 0, bytes = 0;  // offsets, and the whole
};
Workspace workspace_of(const FusedLinearArgs& args, const LinearPlan& plan) {
  const auto aligned = [](std::int64_t bytes) {
    return static_cast<std::size_t>(round_up(bytes, 256));
  };
  Workspace w;
  w.partials = kCounterBytes;
  w.x = w.partials;
  if (plan.splits > 1) {
    const std::int64_t rows = round_up(args.weight.layout.rows, kTileRows);
    w.x += aligned(plan.splits * args.rows * rows * 4);
  }
  w.bytes = w.x;
  // Whether or not x needs it, since addresses may not be known yet.
  if (!is_decode(plan))
    w.bytes += aligned(args.rows * round_up(args.weight.layout.cols, kVector) * 2);
  return w;
}

LinearParams params_of(const FusedLinearArgs& args, const LinearPlan& plan) {
  const FusedMatrix& weight = args.weight;
  const core::GroupLayout& layout = weight.layout;
  LinearParams p;
  p.codes = static_cast<const unsigned char*>(weight.codes);
  p.metadata = static_cast<const unsigned char*>(weight.metadata);
  p.col_scale = static_cast<const float*>(weight.col_scale);
  p.codes_stride = args.codes_stride;
  p.metadata_stride = args.metadata_stride;
  p.col_scale_stride = args.col_scale_stride;
  p.N = static_cast<int>(layout.rows);
  p.K = static_cast<int>(layout.cols);
  p.strips = static_cast<int>(div_up(layout.rows, kTileRows));
  p.tiles = static_cast<int>(div_up(layout.cols, kTileCols));
  if (layout.axis == 1) {
    p.group_steps.divisor = static_cast<std::uint32_t>(group_steps(layout));
    p.group_steps.factor = static_cast<std::uint32_t>(
        div_up(std::int64_t{1} << device::Divider::kShift, p.group_steps.divisor));
    p.float_metadata = weight.metadata_type == DType::kF32;
  } else {
    p.group_size = static_cast<int>(layout.group_size);
    p.scale_rows = static_cast<int>(layout.rows / layout.group_size);
  }
  p.row_begin = args.row_begin;
  p.x = static_cast<const std::uint16_t*>(args.x);
  p.rows = args.rows;
  p.x_stride = args.x_stride;
  p.x_aligned = args.x_stride % kVector == 0 && reinterpret_cast<std::uintptr_t>(args.x) % 16 == 0;
  p.bias = static_cast<const std::uint16_t*>(args.bias);
  p.y = static_cast<std::uint16_t*>(args.y);
  p.y_stride = args.y_stride;
  p.strips_per_block = plan.strips_per_block;
  p.row_shift = std::countr_zero(static_cast<unsigned>(plan.strips_per_block * kTileRows));
  p.splits = plan.splits;
  p.tiles_per_split = plan.tiles_per_split;
  p.slot_bytes = slot_bytes(weight, is_decode(plan) ? device::unit_tiles(bits_of(weight)) : 1);
  p.ring_offset = device::kCounterShared + static_cast<int>(shared_bytes(args, plan).x);
  return p;
}

void prepare_x(const FusedLinearArgs& args, LinearParams& p, std::uint16_t* out,
               StreamHandle stream) {
  const device::PrepareArgs prepare{out, round_up(p.K, kVector)};
  constexpr int kThreads = 128;
  constexpr std::int64_t kMaxRowBlocks = 1024;
  const LaunchShape shape{
      dim3(static_cast<unsigned>(div_up(prepare.out_stride, kThreads)),
           static_cast<unsigned>(std::min(div_up(args.rows, args.experts), kMaxRowBlocks)),
           static_cast<unsigned>(args.experts)),
      kThreads};
  if (args.weight.x_type == DType::kF16) {
    launch(device::prepare_x_kernel<device::F16>, shape, stream, p, prepare);
  } else {
    launch(device::prepare_x_kernel<device::BF16>, shape, stream, p, prepare);
  }
  p.x = out;
  p.x_stride = prepare.out_stride;
  p.x_aligned = true;
}

// choose_linear() compares some hundred plans, which takes longer than a launch.
LinearPlan remembered_plan(const FusedLinearArgs& args) {
  const DeviceTraits& device = current_device();
  const core::GroupLayout& layout = args.weight.layout;
  using Key = std::tuple<const DeviceTraits*, std::int64_t, std::int64_t, std::int64_t, int,
                         BitWidth, DType, std::int64_t, std::int64_t, bool>;
  const Key key{&device,
                layout.rows,
                layout.cols,
                layout.group_size,
                layout.axis,
                args.weight.width,
                args.weight.metadata_type,
                args.rows,
                args.experts,
                args.row_begin == nullptr};
  constexpr std::size_t kMaxPlans = 4096;
  thread_local std::map<Key, LinearPlan> plans;
  if (const auto found = plans.find(key); found != plans.end()) return found->second;
  if (plans.size() >= kMaxPlans) plans.clear();
  return plans[key] = choose_linear(args, device);
}

}  // namespace

std::int64_t fused_max_rows(const FusedMatrix& weight) {
  return fused_max_rows(weight, current_device());
}

std::size_t linear_workspace_bytes(const FusedLinearArgs& args, const LinearPlan& plan) {
  return workspace_of(args, plan).bytes;
}
std::size_t linear_workspace_bytes(const FusedLinearArgs& args) {
  return linear_workspace_bytes(args, remembered_plan(args));
}

void linear(const FusedLinearArgs& args, const LinearPlan& plan, StreamHandle stream) {
  if (args.rows == 0) return;
  const Workspace workspace = workspace_of(args, plan);
  if (args.workspace_bytes < workspace.bytes) {
    throw Failure(Status::kInvalidCall,
                  "the workspace has " + std::to_string(args.workspace_bytes) +
                      " bytes; linear_workspace_bytes() says " + std::to_string(workspace.bytes));
  }
  constexpr std::int64_t kMaxGridZ = 65535;
  if (args.experts > kMaxGridZ) {
    throw Failure(Status::kUnsupported, "there are " + std::to_string(args.experts) +
                                            " experts; a launch takes up to " +
                                            std::to_string(kMaxGridZ));
  }
  LinearParams p = params_of(args, plan);
  auto* memory = static_cast<unsigned char*>(args.workspace);
  p.counters = reinterpret_cast<unsigned*>(memory);
  p.partials = reinterpret_cast<float*>(memory + workspace.partials);
  if (!is_decode(plan) && x_needs_preparing(args)) {
    prepare_x(args, p, reinterpret_cast<std::uint16_t*>(memory + workspace.x), stream);
  }
  const LaunchShape shape{
      dim3(static_cast<unsigned>(div_up(p.strips, plan.strips_per_block) * plan.splits),
           static_cast<unsigned>(plan.token_blocks), static_cast<unsigned>(args.experts)),
      dim3(is_decode(plan) ? device::kDecodeThreads : device::kGemmThreads),
      shared_bytes(args, plan).all()};
  launch_linear(args.weight, plan.kernel, p, shape, stream);
}

void linear(const FusedLinearArgs& args, StreamHandle stream) {
  if (args.rows == 0) return;
  linear(args, remembered_plan(args), stream);
}

}  // namespace hqq::cuda

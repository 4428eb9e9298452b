#include "cuda/linear/linear.hpp"

#include <bit>
#include <map>
#include <string>
#include <tuple>

#include "cuda/device/linear/launch_shape.hpp"
#include "cuda/linear/kernels.hpp"
#include "cuda/tiles.hpp"

namespace hqq::cuda {
namespace {

using device::kTileRows;
using device::LinearParams;

constexpr std::int64_t kVector = 8;  // 16-bit values in 16 bytes

bool is_decode(const LinearPlan& plan) { return plan.kernel != LinearKernel::kGemm; }

// gemm_kernel copies x by 16 bytes.
bool x_needs_preparing(const LinearArgs& args) {
  return args.weight.col_scale != nullptr || args.weight.layout.cols % kVector != 0 ||
         args.x_stride % kVector != 0 || reinterpret_cast<std::uintptr_t>(args.x) % 16 != 0;
}

struct Workspace {
  std::size_t partials = 0, x = 0, bytes = 0;  // offsets, and the whole
};
Workspace workspace_of(const LinearArgs& args, const LinearPlan& plan) {
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

device::MetadataParams metadata_params(DType type, const void* values, const float* step,
                                       const float* offset, std::int64_t stride,
                                       std::int64_t step_stride, std::int64_t offset_stride) {
  const auto bytes = [](const void* address) { return static_cast<const unsigned char*>(address); };
  return {type, bytes(values), bytes(step), bytes(offset), stride, step_stride, offset_stride};
}

// Whether `together` neighbouring values of 16 bits, from a multiple of it on, are an aligned load.
bool is_aligned(const device::MetadataParams& p, std::int64_t row_values, std::int64_t together) {
  const std::int64_t bytes = 2 * together;
  return row_values % together == 0 && p.stride % bytes == 0 &&
         reinterpret_cast<std::uintptr_t>(p.values) % static_cast<std::uintptr_t>(bytes) == 0;
}

void set_weight(const LinearArgs& args, LinearParams& p) {
  const DeviceMatrix& q = args.weight;
  const ExpertStrides& strides = args.strides;
  const core::GroupLayout& layout = q.layout;
  p.codes = q.W_q;
  p.codes_stride = strides.W_q;
  p.scale = metadata_params(q.scale_type, q.scale, q.scale_step, q.scale_offset, strides.scale,
                            strides.scale_step, strides.scale_offset);
  p.zero = metadata_params(q.zero_type, q.zero, q.zero_step, q.zero_offset, strides.zero,
                           strides.zero_step, strides.zero_offset);
  p.col_scale_type = q.col_scale_type;
  p.col_scale = static_cast<const unsigned char*>(q.col_scale);
  p.col_scale_stride = strides.col_scale;
  p.N = static_cast<int>(layout.rows);
  p.K = static_cast<int>(layout.cols);
  p.strips = static_cast<int>(strips_of(layout));
  p.tiles = static_cast<int>(tiles_of(layout));
  const std::int64_t row_values = layout.axis == 1 ? layout.groups_per_row() : layout.cols;
  const std::int64_t together = layout.axis == 1 ? device::kWindowGroups : device::kLaneColumns;
  p.half_scales =
      q.scale_type == q.zero_type && (q.scale_type == DType::kF16 || q.scale_type == DType::kBF16);
  p.scales_aligned =
      is_aligned(p.scale, row_values, together) && is_aligned(p.zero, row_values, together);
  if (layout.axis == 1) {
    p.groups = static_cast<int>(layout.groups_per_row());
    p.group_steps.divisor = static_cast<std::uint32_t>(group_steps(layout));
    p.group_steps.factor = static_cast<std::uint32_t>(
        div_up(std::int64_t{1} << device::Divider::kShift, p.group_steps.divisor));
    p.float_metadata = has_float_metadata(q);
  } else {
    p.group_size = static_cast<int>(layout.group_size);
    p.scale_rows = static_cast<int>(layout.rows / layout.group_size);
  }
}

LinearParams params_of(const LinearArgs& args, const LinearPlan& plan) {
  LinearParams p;
  set_weight(args, p);
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
  const SharedBytes shared = shared_bytes(args, plan);
  if (args.weight.layout.axis == 1) {
    p.ring_groups =
        static_cast<int>(ring_groups(args.weight.layout, stage_tiles(args.weight, plan)));
  }
  p.warps_offset = device::kCounterShared + static_cast<int>(shared.x);
  p.warp_bytes = static_cast<int>(shared.warp);
  return p;
}

// choose_linear() compares some hundred plans, which takes longer than a launch.
LinearPlan remembered_plan(const LinearArgs& args) {
  const DeviceTraits& device = current_device();
  const core::GroupLayout& layout = args.weight.layout;
  using Key = std::tuple<const DeviceTraits*, std::int64_t, std::int64_t, std::int64_t, int,
                         BitWidth, bool, std::int64_t, std::int64_t, bool>;
  const Key key{&device,
                layout.rows,
                layout.cols,
                layout.group_size,
                layout.axis,
                args.weight.width,
                has_float_metadata(args.weight),
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

std::int64_t max_rows(const DeviceMatrix& q, DType x_type) {
  require_product(q.layout, x_type);
  return max_rows(q.layout, current_device());
}

std::size_t linear_workspace_bytes(const LinearArgs& args, const LinearPlan& plan) {
  return workspace_of(args, plan).bytes;
}
std::size_t linear_workspace_bytes(const LinearArgs& args) {
  require_product(args.weight.layout, args.x_type);
  return linear_workspace_bytes(args, remembered_plan(args));
}

void linear(const LinearArgs& args, const LinearPlan& plan, StreamHandle stream) {
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
  require_packing(args.weight, Packing::kCudaTiles);
  LinearParams p = params_of(args, plan);
  auto* memory = static_cast<unsigned char*>(args.workspace);
  p.counters = reinterpret_cast<unsigned*>(memory);
  p.partials = reinterpret_cast<float*>(memory + workspace.partials);
  if (!is_decode(plan) && x_needs_preparing(args)) {
    const device::PrepareArgs prepared{reinterpret_cast<std::uint16_t*>(memory + workspace.x),
                                       round_up(p.K, kVector)};
    prepare_x(args.x_type, p, prepared, args.experts, div_up(args.rows, args.experts), stream);
    p.x = prepared.out;
    p.x_stride = prepared.out_stride;
    p.x_aligned = true;
  }
  const LaunchShape shape{
      dim3(static_cast<unsigned>(div_up(p.strips, plan.strips_per_block) * plan.splits),
           static_cast<unsigned>(plan.token_blocks), static_cast<unsigned>(args.experts)),
      dim3(is_decode(plan) ? device::kDecodeThreads : device::kGemmThreads),
      shared_bytes(args, plan).all()};
  launch_linear(args.weight.width,
                {args.x_type, args.weight.layout.axis, plan.kernel, p, shape, stream});
}

void linear(const LinearArgs& args, StreamHandle stream) {
  require_product(args.weight.layout, args.x_type);
  if (args.rows == 0) return;
  linear(args, remembered_plan(args), stream);
}

}  // namespace hqq::cuda

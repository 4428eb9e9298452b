#include "cuda/device/repack.hpp"
#include "cuda/linear.hpp"
#include "cuda/planes.hpp"

namespace hqq::cuda {
namespace {

using device::kStepCols;
using device::kSteps;
using device::kTileCols;
using device::kTileRows;

constexpr int kThreads = 128;
// The kernels divide numbers of steps up to 2^15 by multiplying (Divider).
constexpr std::int64_t kMaxCols = (std::int64_t{1} << 15) * kStepCols;
constexpr std::int64_t kMaxRows = std::int64_t{1} << 30;

unsigned blocks_for(std::int64_t threads) {
  return static_cast<unsigned>(div_up(threads, kThreads));
}

std::int64_t strips_of(const DeviceMatrix& q) { return div_up(q.layout.rows, kTileRows); }
std::int64_t tiles_of(const DeviceMatrix& q) { return div_up(q.layout.cols, kTileCols); }

// Axis 0: every row of scales serves whole fragments.
bool has_whole_fragments(const core::GroupLayout& layout) {
  return layout.rows % layout.group_size == 0 && layout.group_size % device::kFragmentRows == 0;
}
// Axis 1: groups end where a step of tensor cores ends.
bool has_whole_steps(const core::GroupLayout& layout) {
  return layout.group_size >= layout.cols || layout.group_size % kStepCols == 0;
}

}  // namespace

bool fused_supported(const DeviceMatrix& q, DType x_type, const DeviceTraits& device) {
  const core::GroupLayout& layout = q.layout;
  if (layout.rows < 1 || layout.cols < 1 || layout.cols > kMaxCols || layout.rows > kMaxRows)
    return false;
  if (x_type != DType::kF16 && x_type != DType::kBF16) return false;
  if (device.compute < (x_type == DType::kF16 ? 75 : 80)) return false;
  const bool layout_fits = layout.axis == 1 ? has_whole_steps(layout) : has_whole_fragments(layout);
  if (!layout_fits) return false;
  FusedMatrix weight;
  weight.layout = layout;
  weight.width = q.width;
  weight.metadata_type = fused_metadata_type(q);
  return gemm_fits(weight, device);
}
bool fused_supported(const DeviceMatrix& q, DType x_type) {
  return fused_supported(q, x_type, current_device());
}

FusedSizes fused_sizes(const DeviceMatrix& q, DType) {
  const int bits = device::tile_planes(q.width).bits();
  const std::int64_t tiles = tiles_of(q);
  FusedSizes sizes{};
  sizes.codes_bytes = static_cast<std::size_t>(strips_of(q) * tiles * device::tile_bytes(bits));
  if (q.layout.axis == 1) {
    const int value_bytes = fused_metadata_type(q) == DType::kF32 ? 4 : 2;
    const int unit = device::unit_tiles(bits);
    sizes.metadata_bytes =
        static_cast<std::size_t>(strips_of(q) * div_up(tiles, unit) * slot_groups(q.layout, unit) *
                                 device::row_metadata_bytes(value_bytes));
  } else {
    sizes.metadata_bytes = static_cast<std::size_t>(q.layout.rows / q.layout.group_size * tiles *
                                                    device::kTileMetadataBytes);
  }
  return sizes;
}

void repack(const DeviceMatrix& q, DType x_type, void* codes, void* metadata, StreamHandle stream) {
  device::RepackArgs args;
  args.W_q = q.W_q;
  args.row_bytes = q.row_bytes;
  args.cols = q.layout.cols;
  args.order = {q.layout.rows, q.layout.axis == 1 ? 0 : q.layout.group_size};
  args.strips = strips_of(q);
  args.tiles = tiles_of(q);
  args.codes = static_cast<unsigned char*>(codes);
  const unsigned code_blocks = blocks_for(args.strips * args.tiles * device::kFragments * 32);
  dispatch_planes(q.width, [&](auto planes) {
    constexpr Planes kPlanes = decltype(planes)::value;
    launch(device::repack_codes_kernel<kPlanes.low, kPlanes.high>, {code_blocks, kThreads}, stream,
           args);
  });

  const int bits = device::tile_planes(q.width).bits();
  device::RepackMetadataArgs values{device::scale_of(q), device::zero_of(q),
                                    fused_metadata_type(q)};
  values.rows = q.layout.rows;
  values.cols = q.layout.cols;
  values.metadata = metadata;
  if (q.layout.axis == 1) {
    const int unit = device::unit_tiles(bits);
    values.groups = q.layout.groups_per_row();
    values.strips = args.strips;
    values.units = div_up(args.tiles, unit);
    values.unit_steps = unit * kSteps;
    values.group_steps = group_steps(q.layout);
    values.slot_groups = slot_groups(q.layout, unit);
    const std::int64_t entries = values.strips * values.units * values.slot_groups;
    launch(device::repack_row_metadata_kernel, {blocks_for(entries * kTileRows), kThreads}, stream,
           values);
    return;
  }
  values.scale_rows = q.layout.rows / q.layout.group_size;
  values.tiles = args.tiles;
  values.max_code = (1 << bits) - 1;
  const LaunchShape shape{blocks_for(values.scale_rows * values.tiles * kTileCols), kThreads};
  if (x_type == DType::kF16) {
    launch(device::repack_column_metadata_kernel<device::F16>, shape, stream, values);
  } else {
    launch(device::repack_column_metadata_kernel<device::BF16>, shape, stream, values);
  }
}

}  // namespace hqq::cuda

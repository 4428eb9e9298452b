#include "cuda/linear/choose.hpp"

#include <algorithm>
#include <bit>
#include <string>

#include "cuda/device/linear/launch_shape.hpp"
#include "cuda/tiles.hpp"

namespace hqq::cuda {
namespace {

using device::kDecodeWarps;
using device::kGemmWarps;
using device::kTileCols;
using device::kTileRows;
using device::tile_bytes;

// Blocks that run at a time on a multiprocessor, by registers.
constexpr int kDecodeResident = 2;
constexpr int kGemmResident = 3;
constexpr int kMaxSplits = 64;
// Shared memory that the device takes for each block.
constexpr std::size_t kReservedShared = 1024;
// Costs are bytes that a multiprocessor's share of the bus would carry meanwhile. Starting blocks
// and their first loads take about a microsecond, and so do the fences and the counter of splits:
// 36 KB on an H200.
constexpr std::int64_t kLatencyBytes = 36 * 1024;
// The bus carries 18 bytes a cycle. A tile is about 180 instructions when decoding and 250 in
// gemm_kernel, of which four are issued at a time; tensor cores multiply one with 16 tokens in 32
// cycles.
constexpr std::int64_t kCycleBytes = 18;
constexpr std::int64_t kDecodeTileBytes = 45 * kCycleBytes;
constexpr std::int64_t kGemmTileBytes = 63 * kCycleBytes;
constexpr std::int64_t kGemmTokensBytes = 32 * kCycleBytes;  // of 16 tokens
// A round of loads from the L2 cache, and what it sends one multiprocessor in a cycle.
constexpr std::int64_t kRoundBytes = 300 * kCycleBytes;
constexpr std::int64_t kCacheCycleBytes = 64;

bool is_decode(LinearKernel kernel) { return kernel != LinearKernel::kGemm; }

// Tokens that an expert has on average.
std::int64_t usual_tokens(const LinearArgs& args) {
  return std::max<std::int64_t>(1, div_up(args.rows, args.experts));
}

// Blocks that a multiprocessor runs at a time.
std::int64_t resident_blocks(const LinearArgs& args, const LinearPlan& plan,
                             const DeviceTraits& device) {
  const std::size_t fit = (device.max_shared_bytes + kReservedShared) /
                          (shared_bytes(args, plan).all() + kReservedShared);
  return std::min<std::int64_t>(is_decode(plan.kernel) ? kDecodeResident : kGemmResident,
                                static_cast<std::int64_t>(fit));
}

// What the last block of all adds up, when no other runs any more; see finish(). `values` are rows
// times tokens of a block.
std::int64_t last_block_cost(const LinearPlan& plan, std::int64_t values, std::int64_t threads) {
  if (plan.splits == 1) return 0;
  const std::int64_t rounds =
      div_up(values / 4, device::kLastQuads * threads) * div_up(plan.splits, device::kLastSplits);
  return kLatencyBytes + rounds * kRoundBytes +
         4 * values * plan.splits * kCycleBytes / kCacheCycleBytes;
}

std::int64_t cost(const LinearArgs& args, const LinearPlan& plan, const DeviceTraits& device) {
  const bool decode = is_decode(plan.kernel);
  const int bits = tile_bits(args.weight.width);
  const std::int64_t warps = decode ? kDecodeWarps : kGemmWarps;
  // Warps with a strip and a share of its tiles, in whole units; the others idle.
  const std::int64_t strips =
      std::min<std::int64_t>(strips_of(args.weight.layout), plan.strips_per_block);
  const std::int64_t parts = warps / plan.strips_per_block;
  const std::int64_t unit = decode ? device::unit_tiles(bits) : 1;
  const std::int64_t share = div_up(plan.tiles_per_split, parts * unit) * unit;
  const std::int64_t working = strips * div_up(plan.tiles_per_split, share);

  const std::int64_t tokens = std::min<std::int64_t>(usual_tokens(args), tokens_of(plan.kernel));
  const std::int64_t values = tokens * strips * kTileRows;
  const std::int64_t x_bytes = plan.tiles_per_split * kTileCols * 2 * tokens;
  const std::int64_t partial_bytes = plan.splits > 1 ? 4 * values : 0;
  const std::int64_t work =
      decode ? kDecodeTileBytes : std::max(kGemmTileBytes, div_up(tokens, 16) * kGemmTokensBytes);
  const std::int64_t tile_cost = std::max<std::int64_t>(tile_bytes(bits), work);

  const std::int64_t blocks = div_up(strips_of(args.weight.layout), plan.strips_per_block) *
                              plan.splits * plan.token_blocks * std::min(args.experts, args.rows);
  const std::int64_t per_multiprocessor = div_up(blocks, device.multiprocessors);
  const std::int64_t resident = resident_blocks(args, plan, device);
  // Where several blocks run at a time, the others hide most of what a new one waits for.
  const std::int64_t waves = div_up(per_multiprocessor, resident);
  const std::int64_t latency = kLatencyBytes * (3 + waves) / 4;
  const std::int64_t stream =
      per_multiprocessor * (working * share * tile_cost + x_bytes + partial_bytes);
  // Few warps leave the bus idle now and then: 8 a fifth of the time, 4 a third, 2 half of it.
  const std::int64_t running = working * std::min(resident, per_multiprocessor);
  const std::int64_t idle = running <= 8 ? 2 * stream / running : 0;
  return stream + idle + latency + last_block_cost(plan, values, 32 * warps);
}

LinearKernel kernel_for(const LinearArgs& args) {
  const std::int64_t tokens = usual_tokens(args);
  if (tokens <= 8) return LinearKernel::kDecode8;
  if (tokens <= 16 && args.weight.layout.axis == 1) return LinearKernel::kDecode16;
  return LinearKernel::kGemm;
}

// The cheapest way to cut the work for this kernel; splits 0: there is none.
LinearPlan best_cut(const LinearArgs& args, LinearKernel kernel, const DeviceTraits& device) {
  LinearPlan best;
  best.splits = 0;
  std::int64_t best_cost = 0;
  const auto tiles = static_cast<int>(tiles_of(args.weight.layout));
  const int max_splits = std::min(tiles, kMaxSplits);
  for (int strips = is_decode(kernel) ? kDecodeWarps : kGemmWarps; strips >= 1; strips /= 2) {
    for (int splits = 1; splits <= max_splits; ++splits) {
      const LinearPlan plan = make_plan(args, kernel, strips, splits);
      const bool possible = plan.splits == splits && counters_suffice(args, plan) &&
                            shared_bytes(args, plan).all() <= device.max_shared_bytes;
      if (!possible) continue;
      const std::int64_t its_cost = cost(args, plan, device);
      if (best.splits != 0 && its_cost >= best_cost) continue;
      best = plan;
      best_cost = its_cost;
    }
    if (!is_decode(kernel)) break;
  }
  return best;
}

}  // namespace

int tokens_of(LinearKernel kernel) {
  switch (kernel) {
    case LinearKernel::kDecode8:
      return 8;
    case LinearKernel::kDecode16:
      return 16;
    case LinearKernel::kGemm:
      return 64;
  }
  return 0;
}

std::int64_t group_steps(const core::GroupLayout& layout) {
  const std::int64_t row_steps = div_up(layout.cols, kTileCols) * device::kSteps;
  // The one group of a row takes in its padding.
  return layout.group_size >= layout.cols ? row_steps : layout.group_size / device::kStepCols;
}

std::int64_t ring_groups(const core::GroupLayout& layout, int tiles) {
  const std::int64_t steps = tiles * device::kSteps, size = group_steps(layout);
  const auto windows = [](std::int64_t groups) {
    return div_up(groups, std::int64_t{device::kWindowGroups});
  };
  std::int64_t most = 1;
  if (steps % size == 0) {
    most = windows(steps / size);  // the first begins a window, or all are in one
  } else if (size % steps != 0) {
    most = windows(div_up(steps, size)) + 1;  // one begins before, in any place of a window
  }
  return device::kWindowGroups *
         static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(most)));
}

bool has_float_metadata(const DeviceMatrix& q) {
  return q.scale_type != DType::kF16 || q.zero_type != DType::kF16;
}

int stage_tiles(const DeviceMatrix& weight, const LinearPlan& plan) {
  return is_decode(plan.kernel) ? device::unit_tiles(tile_bits(weight.width)) : 1;
}

std::size_t SharedBytes::all() const { return device::kCounterShared + x + warps; }

SharedBytes shared_bytes(const LinearArgs& args, const LinearPlan& plan) {
  const DeviceMatrix& weight = args.weight;
  const bool decode = is_decode(plan.kernel);
  const int tiles = stage_tiles(weight, plan);
  const int warps = decode ? device::kDecodeWarps : device::kGemmWarps;
  const int depth = decode ? device::kDecodeRing : device::kGemmRing;
  const std::int64_t scales =
      weight.layout.axis == 0
          ? device::kColumnRingBytes
          : ring_groups(weight.layout, tiles) * device::row_entry_bytes(has_float_metadata(weight));
  const int tokens = tokens_of(plan.kernel);
  const int parts = warps / plan.strips_per_block;
  const auto sums = static_cast<std::size_t>(
      4 * parts * tokens * device::sums_stride(plan.strips_per_block * kTileRows));
  SharedBytes bytes;
  bytes.warp =
      static_cast<std::size_t>(depth * tiles * tile_bytes(tile_bits(weight.width)) + scales);
  bytes.warps = static_cast<std::size_t>(warps) * bytes.warp;
  if (decode) {
    const auto x_rows = std::min<std::int64_t>(args.rows + 1, tokens);  // see load_x()
    const std::int64_t x_bytes =
        x_rows * 2 * device::decode_x_stride(plan.tiles_per_split * kTileCols);
    bytes.x = std::max(sums, static_cast<std::size_t>(x_bytes));
  } else {
    // The sums may reach into the rings.
    bytes.x = static_cast<std::size_t>(device::kGemmRing * device::kGemmXBytes);
    bytes.warps = std::max(bytes.warps, sums - std::min(sums, bytes.x));
  }
  return bytes;
}

bool counters_suffice(const LinearArgs& args, const LinearPlan& plan) {
  const std::int64_t row_blocks = div_up(strips_of(args.weight.layout), plan.strips_per_block);
  constexpr std::int64_t kCounters = kCounterBytes / sizeof(unsigned);
  return plan.splits == 1 || row_blocks * args.rows <= kCounters;
}

LinearPlan make_plan(const LinearArgs& args, LinearKernel kernel, int strips_per_block,
                     int splits) {
  LinearPlan plan;
  plan.kernel = kernel;
  plan.strips_per_block = strips_per_block;
  const std::int64_t tiles = tiles_of(args.weight.layout);
  const int unit = device::unit_tiles(tile_bits(args.weight.width));
  plan.tiles_per_split = static_cast<int>(round_up(div_up(tiles, splits), unit));
  plan.splits = static_cast<int>(div_up(tiles, plan.tiles_per_split));  // none without tiles
  // Experts with more tokens than twice the average take several turns.
  const int tokens = tokens_of(kernel);
  constexpr std::int64_t kMaxGridY = 65535;
  const std::int64_t all = div_up(args.rows, tokens);
  const std::int64_t wanted =
      args.row_begin == nullptr ? all : std::min(all, div_up(2 * usual_tokens(args), tokens));
  plan.token_blocks = static_cast<int>(std::min(wanted, kMaxGridY));
  return plan;
}

LinearPlan choose_linear(const LinearArgs& args, const DeviceTraits& device) {
  LinearPlan plan = best_cut(args, kernel_for(args), device);
  // Decoding may need more splits than there are counters, or more shared memory than sm_75 has.
  if (plan.splits == 0) plan = best_cut(args, LinearKernel::kGemm, device);
  if (plan.splits == 0) {
    throw Failure(Status::kUnsupported,
                  "a block may have " + std::to_string(device.max_shared_bytes) +
                      " bytes of shared memory on this device; this layer needs more");
  }
  return plan;
}

std::int64_t max_rows(const core::GroupLayout& layout, const DeviceTraits& device) {
  // Dequantizing costs a pass of 16-bit weights out to memory and back in; a dense product on
  // Hopper runs at about 1.6 times the rate of mma.sync, on other GPUs at its rate. Linear kernels
  // win until that difference, and reading weights once every 64 tokens, outweigh the pass: earlier
  // where matrices are small and stay in the L2 cache.
  constexpr std::int64_t kSmall = 32 * 1024 * 1024;  // weights
  const bool small = layout.rows * layout.cols <= kSmall;
  const bool wgmma = device.compute >= 90 && device.compute < 100;
  if (wgmma) return small ? 128 : 192;
  return small ? 192 : 256;
}

}  // namespace hqq::cuda

#include "cuda/device/format/pack.hpp"
#include "cuda/launch.hpp"
#include "cuda/pack.hpp"
#include "cuda/planes.hpp"
#include "cuda/tiles.hpp"

namespace hqq::cuda {
namespace {

constexpr int kThreads = 128;

LaunchShape shape_of(std::int64_t threads) {
  return {dim3(static_cast<unsigned>(div_up(threads, kThreads))), dim3(kThreads)};
}

}  // namespace

void pack(const DeviceMatrix& format1, void* tiles, StreamHandle stream) {
  require_packing(format1, Packing::kFormat1);
  require_tiles(format1.layout);
  device::PackArgs args;
  args.W_q = format1.W_q;
  args.row_bytes = format1.row_bytes;
  args.cols = format1.layout.cols;
  args.order = row_order(format1.layout);
  args.strips = strips_of(format1.layout);
  args.tiles = tiles_of(format1.layout);
  args.codes = static_cast<unsigned char*>(tiles);
  const LaunchShape shape = shape_of(args.strips * args.tiles * device::kFragments * 32);
  dispatch_planes(format1.width, [&](auto planes) {
    constexpr Planes kPlanes = decltype(planes)::value;
    launch(device::pack_kernel<kPlanes.low, kPlanes.high>, shape, stream, args);
  });
}

void unpack(const DeviceMatrix& tiles, std::uint8_t* W_q, std::int64_t row_bytes,
            StreamHandle stream) {
  require_packing(tiles, Packing::kCudaTiles);
  require_tiles(tiles.layout);
  const core::RowFormat format = core::row_format(tiles.width);
  const device::UnpackArgs args{tiled_rows(tiles), {W_q, row_bytes, format}};
  const LaunchShape shape = shape_of(tiles.layout.rows * div_up(tiles.layout.cols, format.block));
  dispatch_planes(tiles.width, [&](auto planes) {
    constexpr Planes kPlanes = decltype(planes)::value;
    launch(device::unpack_kernel<kPlanes.low, kPlanes.high>, shape, stream, args);
  });
}

}  // namespace hqq::cuda

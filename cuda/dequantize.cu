#include "cuda/dequantize.hpp"
#include "cuda/device/format/dequantize.hpp"
#include "cuda/launch.hpp"
#include "cuda/planes.hpp"
#include "cuda/tiles.hpp"

namespace hqq::cuda {

void dequantize_rows(const DeviceMatrix& q, const std::int64_t* ids, std::int64_t count, void* out,
                     DType type, StreamHandle stream) {
  if (count == 0) return;
  device::DequantizeParams params;
  params.layout = q.layout;
  params.num_groups = q.layout.num_groups();
  params.groups_per_row = q.layout.groups_per_row();
  params.scale = device::scale_of(q);
  params.zero = device::zero_of(q);
  params.col_scale_type = q.col_scale_type;
  params.col_scale = q.col_scale;
  params.ids = ids;
  params.out_rows = count;
  params.out = out;
  params.out_type = type;
  if (q.packing == Packing::kFormat1) {
    params.W_q = q.W_q;
    params.row_bytes = q.row_bytes;
  } else {
    require_tiles(q.layout);
    params.tiles = tiled_rows(q);
  }
  const std::int64_t octets = div_up(q.layout.cols, device::kOctet) * count;
  const LaunchShape shape{dim3(static_cast<unsigned>(div_up(octets, device::kDequantizeThreads))),
                          dim3(device::kDequantizeThreads)};
  dispatch_planes(q.width, [&](auto planes) {
    constexpr Planes kPlanes = decltype(planes)::value;
    using enum Packing;
    launch(q.packing == kFormat1 ? device::dequantize_kernel<kFormat1, kPlanes.low, kPlanes.high>
                                 : device::dequantize_kernel<kCudaTiles, kPlanes.low, kPlanes.high>,
           shape, stream, params);
  });
}

void dequantize(const DeviceMatrix& q, void* out, DType type, StreamHandle stream) {
  dequantize_rows(q, nullptr, q.layout.rows, out, type, stream);
}

}  // namespace hqq::cuda

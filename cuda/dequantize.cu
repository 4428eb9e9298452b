#include "cuda/dequantize.hpp"
#include "cuda/device/dequantize.hpp"
#include "cuda/planes.hpp"
#include "cuda/runtime.hpp"

namespace hqq::cuda {

void dequantize_rows(const DeviceMatrix& q, const std::int64_t* ids, std::int64_t count, void* out,
                     DType type, StreamHandle stream) {
  if (count == 0) return;
  const device::DequantizeParams params{q.layout,
                                        q.layout.num_groups(),
                                        q.layout.groups_per_row(),
                                        q.W_q,
                                        q.row_bytes,
                                        device::scale_of(q),
                                        device::zero_of(q),
                                        q.col_scale_type,
                                        q.col_scale,
                                        ids,
                                        count,
                                        out,
                                        type};
  const std::int64_t octets = div_up(q.layout.cols, device::kOctet) * count;
  const auto blocks = static_cast<unsigned>(div_up(octets, device::kDequantizeThreads));
  dispatch_planes(q.width, [&](auto planes) {
    constexpr auto kPlanes = decltype(planes)::value;
    launch(device::dequantize_kernel<kPlanes.low, kPlanes.high>,
           {dim3(blocks), dim3(device::kDequantizeThreads)}, stream, params);
  });
}

void dequantize(const DeviceMatrix& q, void* out, DType type, StreamHandle stream) {
  dequantize_rows(q, nullptr, q.layout.rows, out, type, stream);
}

}  // namespace hqq::cuda

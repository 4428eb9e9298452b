#include <algorithm>

#include "cuda/device/linear/prepare_x.hpp"
#include "cuda/launch.hpp"
#include "cuda/linear/kernels.hpp"

namespace hqq::cuda {

void prepare_x(DType x_type, const device::LinearParams& params, const device::PrepareArgs& out,
               std::int64_t experts, std::int64_t rows, StreamHandle stream) {
  constexpr int kThreads = 128;
  constexpr std::int64_t kMaxRowBlocks = 1024;
  const LaunchShape shape{
      dim3(static_cast<unsigned>(div_up(out.out_stride, kThreads)),
           static_cast<unsigned>(std::min(rows, kMaxRowBlocks)), static_cast<unsigned>(experts)),
      kThreads};
  launch(x_type == DType::kF16 ? device::prepare_x_kernel<simt::F16>
                               : device::prepare_x_kernel<simt::BF16>,
         shape, stream, params, out);
}

}  // namespace hqq::cuda

#include "cuda/linear_kernels-inl.hpp"

void hqq::cuda::launch_linear_2(DType x_type, int axis, LinearKernel kernel,
                                const device::LinearParams& params, const LaunchShape& shape,
                                StreamHandle stream) {
  launch_planes<2, 0>(x_type, axis, kernel, params, shape, stream);
}

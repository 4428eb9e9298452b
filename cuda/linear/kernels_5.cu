#include "cuda/linear/kernels-inl.hpp"

template void hqq::cuda::launch_linear<4, 1>(const hqq::cuda::LinearLaunch& launch);

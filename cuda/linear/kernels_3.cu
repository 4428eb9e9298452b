#include "cuda/linear/kernels-inl.hpp"

template void hqq::cuda::launch_linear<2, 1>(const hqq::cuda::LinearLaunch& launch);

#include "cuda/linear/kernels-inl.hpp"

template void hqq::cuda::launch_linear<8, 0>(const hqq::cuda::LinearLaunch& launch);

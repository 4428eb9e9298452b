// What kernels are written in: thread indices, loads and stores, warp operations, asynchronous
// copies, tensor cores. The one header that knows whether a GPU or the SIMT shim (tests/cuda/simt)
// runs them.
//
// Rules for kernels, which the shim checks and a GPU would not forgive:
// - Memory is touched through ld_*, st_*, atomics and cp_async only, never by dereferencing.
// - All shared memory is dynamic: shared_memory() returns its start, the launch gives its size.
// - __syncthreads() is reached by all threads of a block, warp operations by all lanes of their
// mask.
#pragma once

#ifdef HQQ_SIMT_SHIM
#include "tests/cuda/simt/device.hpp"
#else
#include "cuda/device/simt/gpu.hpp"
#endif

namespace hqq::cuda::device {
using simt::BF16;
using simt::F16;
using simt::ld_global;
using simt::ld_shared;
using simt::st_global;
using simt::st_shared;
}  // namespace hqq::cuda::device

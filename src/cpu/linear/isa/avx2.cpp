// The kernels for AVX2, FMA and F16C (flags: cmake/HqqCpuKernels.cmake).
#include <immintrin.h>

#include <cstring>

#include "src/cpu/linear/isa/macros.hpp"
#include "src/cpu/linear/kernels.hpp"

namespace hqq::cpu::avx2 {
namespace {
#include "src/cpu/linear/isa/avx2.hpp"
#include "src/cpu/linear/kernels/kernels-inl.hpp"
}  // namespace

const LinearKernels& linear_kernels() {
  static const LinearKernels kernels = all_kernels("avx2");
  return kernels;
}

}  // namespace hqq::cpu::avx2

// The kernels for AVX-512 (flags: cmake/HqqCpuKernels.cmake).
#include <immintrin.h>

#include <cstring>

#include "src/cpu/linear/kernels.hpp"
#include "src/cpu/linear/macros.hpp"

namespace hqq::cpu::avx512 {
namespace {
#include "src/cpu/linear/isa_avx512.hpp"
#include "src/cpu/linear/kernels-inl.hpp"
}  // namespace

const LinearKernels& linear_kernels() {
  static const LinearKernels kernels = all_kernels("avx512");
  return kernels;
}

}  // namespace hqq::cpu::avx512

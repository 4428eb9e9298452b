// The kernels for AVX-512 (flags: cmake/HqqCpuKernels.cmake).
#include <immintrin.h>

#include <cstring>

#include "src/cpu/linear/isa/macros.hpp"
#include "src/cpu/linear/kernels.hpp"

namespace hqq::cpu::avx512 {
namespace {
#include "src/cpu/linear/isa/avx512.hpp"
#include "src/cpu/linear/kernels/kernels-inl.hpp"
}  // namespace

const LinearKernels& linear_kernels() {
  static const LinearKernels kernels = all_kernels("avx512");
  return kernels;
}

}  // namespace hqq::cpu::avx512

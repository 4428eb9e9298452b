// The kernels for AVX2 with AVX-VNNI (flags: cmake/HqqCpuKernels.cmake)
#include <immintrin.h>

#include <cstring>

#include "src/cpu/linear/isa/macros.hpp"
#include "src/cpu/linear/kernels.hpp"

namespace hqq::cpu::avx2_vnni {
namespace {
#define HQQ_ISA_VNNI
#include "src/cpu/linear/isa/avx2.hpp"
#include "src/cpu/linear/kernels/kernels-inl.hpp"
}  // namespace

const LinearKernels& linear_kernels() {
  static const LinearKernels kernels = [] {
    LinearKernels k = avx2::linear_kernels();
    k.name = "avx2_vnni";
    fill_decode_fast(k);
    fill_panels_fast(k);
    return k;
  }();
  return kernels;
}

}  // namespace hqq::cpu::avx2_vnni

// The kernels for 64-bit Arm.
#include <arm_neon.h>

#include <cstring>

#include "src/cpu/linear/kernels.hpp"
#include "src/cpu/linear/macros.hpp"

namespace hqq::cpu::neon {
namespace {
#include "src/cpu/linear/isa_neon.hpp"
#include "src/cpu/linear/kernels-inl.hpp"
}  // namespace

const LinearKernels& linear_kernels() {
  static const LinearKernels kernels = [] {
    LinearKernels k{};
    k.name = "neon";
    fill_decode_fast(k);
    fill_decode_exact(k);
    fill_panels_fast(k);
    fill_panels_exact(k);
    fill_activations(k);
    return k;
  }();
  return kernels;
}

}  // namespace hqq::cpu::neon

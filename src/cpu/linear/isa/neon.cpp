// The kernels for 64-bit Arm.
#include <arm_neon.h>

#include <cstring>

#include "src/cpu/linear/isa/macros.hpp"
#include "src/cpu/linear/kernels.hpp"

namespace hqq::cpu::neon {
namespace {
#include "src/cpu/linear/isa/neon.hpp"
#include "src/cpu/linear/kernels/kernels-inl.hpp"
}  // namespace

const LinearKernels& linear_kernels() {
  static const LinearKernels kernels = all_kernels("neon");
  return kernels;
}

}  // namespace hqq::cpu::neon

// The kernels for any machine, without those that decode few rows: panels serve them.
#ifndef HQQ_SMALL_CODE  // builds with sanitizers define it for all kernels
#define HQQ_SMALL_CODE
#endif
#define HQQ_NO_DECODE
#include <cstring>

#include "hqq/core/math.hpp"
#include "src/cpu/linear/isa/macros.hpp"
#include "src/cpu/linear/kernels.hpp"

namespace hqq::cpu::scalar {
namespace {
#include "src/cpu/linear/isa/scalar.hpp"
#include "src/cpu/linear/kernels/kernels-inl.hpp"
}  // namespace

const LinearKernels& linear_kernels() {
  static const LinearKernels kernels = all_kernels("scalar");
  return kernels;
}

}  // namespace hqq::cpu::scalar

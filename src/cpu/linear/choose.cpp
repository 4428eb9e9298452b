#include "src/cpu/linear/choose.hpp"

#include <string>

#include "src/cpu/dispatch.hpp"

namespace hqq::cpu {

const LinearKernels& linear_kernels() {
  const std::string& target = current_target();
#if defined(__x86_64__)
  if (target == "AVX3_VNNI") return avx512_vnni::linear_kernels();
  if (target == "AVX3") return avx512::linear_kernels();
  if (target == "AVX2_VNNI") return avx2_vnni::linear_kernels();
  if (target == "AVX2") return avx2::linear_kernels();
#elif defined(__aarch64__)
  if (target == "NEON") return neon::linear_kernels();
#endif
  return scalar::linear_kernels();
}

}  // namespace hqq::cpu

// Which instruction set the CPU kernels use.
#pragma once

#include <string>
#include <vector>

namespace hqq::cpu {

// Targets this machine can run, best first: some of "AVX3_VNNI", "AVX3" (AVX-512), "AVX2_VNNI",
// "AVX2", "SSE4", "NEON", those that newer versions of Highway add, and always "scalar", the core's
// one-lane instantiation. The fused linear kernels alone know "_VNNI"; on "SSE4" they are the
// scalar ones.
std::vector<std::string> supported_targets();
// The one in use: the best, or HQQ_CPU_TARGET if it names a supported one.
const std::string& current_target();
// Chooses a target for the whole process; throws std::invalid_argument for one that is not
// supported.
void set_target(const std::string& name);

// True when the one-lane instantiation of the core is chosen, which Highway does not know about.
bool use_scalar();

}  // namespace hqq::cpu

// Calls the variant of a kernel that fits the chosen target. Kernels come as `name` (one per SIMD
// target) and `name##_scalar` (in the baseline target only).
#define HQQ_DISPATCH(name)                                        \
  (::hqq::cpu::use_scalar() ? &HWY_STATIC_DISPATCH(name##_scalar) \
                            : HWY_DYNAMIC_DISPATCH_POINTER(name))
#define HWY_DYNAMIC_DISPATCH_POINTER(name) (&HWY_DYNAMIC_DISPATCH(name))

#include "src/cpu/linear/choose.hpp"

#include <map>
#include <string>
#include <vector>

#include "src/backend.hpp"
#include "src/cpu/dispatch.hpp"
#include "src/cpu/linear/tiles/column_plan.hpp"
#include "src/cpu/linear/tiles/tile_order.hpp"

namespace hqq::cpu {
namespace {

// Null: this target has none of its own.
const LinearKernels* own_kernels(const std::string& target) {
  if (target == "scalar") return &scalar::linear_kernels();
#if defined(__x86_64__)
  if (target == "AVX3_VNNI") return &avx512_vnni::linear_kernels();
  if (target == "AVX3") return &avx512::linear_kernels();
  if (target == "AVX2_VNNI") return &avx2_vnni::linear_kernels();
  if (target == "AVX2") return &avx2::linear_kernels();
#elif defined(__aarch64__)
  // Newer versions of Highway have NEON_WITHOUT_AES and NEON_BF16 as well.
  if (target.starts_with("NEON")) return &neon::linear_kernels();
#endif
  return nullptr;
}

// A target includes all that are worse. One without kernels of its own (AVX3_ZEN4 of newer versions
// of Highway) has the best of theirs.
std::map<std::string, const LinearKernels*> kernels_of_targets() {
  const std::vector<std::string> targets = supported_targets();
  std::map<std::string, const LinearKernels*> kernels;
  const LinearKernels* best = nullptr;
  for (auto target = targets.rbegin(); target != targets.rend(); ++target) {
    if (const LinearKernels* own = own_kernels(*target)) best = own;
    kernels[*target] = best;
  }
  return kernels;
}

}  // namespace

const LinearKernels& linear_kernels() {
  static const auto kernels = kernels_of_targets();
  return *kernels.at(current_target());
}

LinearKernel linear_kernel(const PackedMatrix& q, std::int64_t rows, LinearMode mode) {
  if (!can_tile(q.config, q.out_features, q.in_features)) {
    return {"row by row", LinearMode::kExact, current_target()};
  }
  const Columns columns(q.layout());
  const TileKernel decode =
      decode_kernel(linear_kernels(), mode == LinearMode::kFast,
                    TileOrder(q.config, q.layout()).bits(), rows, columns.plan(), MetaType::kF32);
  return {decode == nullptr ? "panels" : "decode", mode, current_target()};
}

}  // namespace hqq::cpu

// Which kernels run: the only place that decides.
#pragma once

#include "src/cpu/linear/kernels.hpp"

namespace hqq::cpu {

// The kernels of the chosen target (src/cpu/dispatch.hpp).
const LinearKernels& linear_kernels();

// Rows of x up to which codes are used as they are unpacked; for more, panels are unpacked first.
inline constexpr std::int64_t kMaxDecodeRows = 4;

// The kernel that uses codes as it unpacks them, for so many rows of x; null where panels do it. A
// kernel for more rows than there are gets the last one several times.
inline TileKernel decode_kernel(const LinearKernels& kernels, bool fast, int bits,
                                std::int64_t rows, const ColumnPlan& plan, MetaType meta) {
  if (plan.block_units == 0 || rows > kMaxDecodeRows) return nullptr;
  const int index = field_packing_index(bits);
  const int type = static_cast<int>(meta);
  if (fast) return kernels.decode_fast[index][rows == 1 ? 0 : rows == 2 ? 1 : 2][type];
  return kernels.decode_exact[index][rows == 1 ? 0 : 1][type];
}
// Whether that kernel takes float16 metadata.
inline bool decodes_f16(bool fast, std::int64_t rows) { return fast || rows == 1; }

}  // namespace hqq::cpu

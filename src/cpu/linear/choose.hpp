// Which kernels run: the only place that decides.
#pragma once

#include "src/cpu/linear/kernels.hpp"

namespace hqq::cpu {

// The kernels of the chosen target (src/cpu/dispatch.hpp).
const LinearKernels& linear_kernels();

// The kernel that uses codes as it unpacks them, for so many rows of x; null where panels are
// unpacked first. The last row is repeated to fill a kernel's rows.
inline TileKernel decode_kernel(const LinearKernels& kernels, bool fast, int bits,
                                std::int64_t rows, const ColumnPlan& plan, MetaType meta) {
  if (plan.block_units == 0 || rows > (fast ? 4 : 1)) return nullptr;
  const int index = stored_bits_index(bits);
  const int type = static_cast<int>(meta);
  if (!fast) return kernels.decode_exact[index][type];
  return kernels.decode_fast[index][rows == 1 ? 0 : rows == 2 ? 1 : 2][type];
}

}  // namespace hqq::cpu

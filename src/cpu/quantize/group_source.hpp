// The groups of one matrix, as the CPU kernels see them.
#pragma once

#include "hqq/core/group.hpp"
#include "hqq/tensor.hpp"

namespace hqq::cpu {

struct GroupSource {
  TensorView W;
  core::GroupLayout layout;
  // 1 / col_scale, [cols]; null: not balanced. Weights are multiplied by it as they are loaded.
  const float* inv_col_scale = nullptr;
  // Importance of the columns, [cols], all > 0; null: all alike.
  const float* importance = nullptr;
};

// Rows (axis 1) or groups (axis 0) a unit of parallel work has. A multiple of every lane count, so
// that units do not depend on the CPU.
inline constexpr std::int64_t kUnitRows = 16;
inline constexpr std::int64_t kUnitGroups = 256;

inline std::int64_t num_units(const core::GroupLayout& layout) {
  return layout.axis == 1 ? (layout.rows + kUnitRows - 1) / kUnitRows
                          : (layout.num_groups() + kUnitGroups - 1) / kUnitGroups;
}

}  // namespace hqq::cpu

// Where the weights of a group lie in a matrix, for both axes and for tails. Integer arithmetic
// only.
#pragma once

#include <cstdint>

#include "hqq/core/host_device.hpp"

namespace hqq::core {

// Axis 1: group (row, gi) is `group_size` consecutive weights of a row; the last group of a row may
// be shorter. Axis 0 is upstream's reshape to [group_size, -1]: group j holds the weights at the
// flat (row-major) positions j, j + G, j + 2G, ... with G = num_groups; the last groups may be one
// shorter.
struct GroupLayout {
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t group_size = 0;  // resolved: > 0
  int axis = 1;

  HQQ_HD std::int64_t numel() const { return rows * cols; }
  // Axis 1 only.
  HQQ_HD std::int64_t groups_per_row() const { return (cols + group_size - 1) / group_size; }
  HQQ_HD std::int64_t num_groups() const {
    return axis == 1 ? rows * groups_per_row() : (numel() + group_size - 1) / group_size;
  }
  // Axis 1: length of group gi of any row.
  HQQ_HD std::int64_t length_in_row(std::int64_t gi) const {
    const std::int64_t rest = cols - gi * group_size;
    return rest < group_size ? rest : group_size;
  }
  // Axis 0: number of weights of group j: the positions j + i * G below numel.
  HQQ_HD std::int64_t strided_length(std::int64_t j) const {
    const std::int64_t groups = num_groups();
    return (numel() - j + groups - 1) / groups;
  }
  // Shape of scale and zero.
  HQQ_HD std::int64_t metadata_rows() const {
    if (axis == 1) return rows;
    return num_groups() % cols == 0 ? num_groups() / cols : 1;
  }
  HQQ_HD std::int64_t metadata_cols() const { return num_groups() / metadata_rows(); }
};

// Columns that a tile of the balancing has: those of the groups; 64 when groups do not run along
// rows. Never more than 256: a whole row of a large layer would leave the cache and gain nothing.
HQQ_HD std::int64_t balance_tile_cols(const GroupLayout& layout) {
  if (layout.axis != 1) return 64;
  return layout.group_size < 256 ? layout.group_size : 256;
}

}  // namespace hqq::core

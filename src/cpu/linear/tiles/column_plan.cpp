#include "src/cpu/linear/tiles/column_plan.hpp"

#include <algorithm>

namespace hqq::cpu {

namespace {

// Columns of all blocks but a group's last. Where groups are whole units, so are blocks, and none
// but the last of a row is shorter.
std::int64_t block_cols(std::int64_t group, std::int64_t cols) {
  if (group == cols || group % kMaxBlockCols == 0) return kMaxBlockCols;
  if (group % kUnitCols == 0) return kUnitCols;
  return std::min<std::int64_t>(kMaxBlockCols, group);
}

}  // namespace

Columns::Columns(const core::GroupLayout& layout) {
  // With axis 0 the scales are in x already, and a row is one group.
  const std::int64_t group =
      layout.axis == 1 ? std::min(layout.group_size, layout.cols) : layout.cols;
  const std::int64_t step = block_cols(group, layout.cols);
  std::int32_t index = 0;
  for (std::int64_t begin = 0; begin < layout.cols; begin += group, ++index) {
    const std::int64_t end = std::min(layout.cols, begin + group);
    for (std::int64_t col = begin; col < end; col += step) {
      blocks_.push_back({static_cast<std::int32_t>(col),
                         static_cast<std::int32_t>(std::min(step, end - col)), index});
    }
  }
  plan_.units = (layout.cols + kUnitCols - 1) / kUnitCols;
  plan_.blocks = blocks_.data();
  plan_.num_blocks = static_cast<std::int64_t>(blocks_.size());
  plan_.num_groups = index;
  const bool whole_units = group == layout.cols || group % kUnitCols == 0;
  plan_.block_units = whole_units ? step / kUnitCols : 0;
  plan_.group_blocks = (group + step - 1) / step;
}

std::vector<std::pair<std::int64_t, std::int64_t>> Columns::panels(int units) const {
  std::vector<std::pair<std::int64_t, std::int64_t>> panels;
  for (std::int64_t first = 0; first < plan_.num_blocks;) {
    std::int64_t end = first;
    const std::int64_t limit = blocks_[std::size_t(first)].first_col + units * kUnitCols;
    while (end < plan_.num_blocks &&
           blocks_[std::size_t(end)].first_col + blocks_[std::size_t(end)].cols <= limit) {
      ++end;
    }
    panels.emplace_back(first, end);
    first = end;
  }
  return panels;
}

}  // namespace hqq::cpu

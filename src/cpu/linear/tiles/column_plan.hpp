// How the columns of a matrix are divided into groups, blocks and panels.
#pragma once

#include <vector>

#include "hqq/core/group.hpp"
#include "src/cpu/linear/kernels.hpp"

namespace hqq::cpu {

class Columns {
 public:
  explicit Columns(const core::GroupLayout& layout);

  const ColumnPlan& plan() const { return plan_; }
  std::int64_t padded() const { return plan_.units * kUnitCols; }
  // {first block, end block} of the panels of at most `units` units.
  std::vector<std::pair<std::int64_t, std::int64_t>> panels(int units) const;

  Columns(const Columns&) = delete;
  Columns& operator=(const Columns&) = delete;

 private:
  std::vector<Block> blocks_;
  ColumnPlan plan_{};
};

}  // namespace hqq::cpu

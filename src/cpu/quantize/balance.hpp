// Column factors that balance a matrix before it is quantized (docs/solver.md, "Balance").
#pragma once

#include <cstdint>
#include <vector>

#include "src/cpu/quantize/group_source.hpp"

namespace hqq::cpu {

// Sinkhorn balancing after SINQ (arXiv 2509.22944), inside each tile of `tile_cols` columns: the
// factors [cols] by which columns are divided, each tile's with mean 1.
std::vector<float> sinkhorn_factors(const GroupSource& source, std::int64_t tile_cols, int threads);

}  // namespace hqq::cpu

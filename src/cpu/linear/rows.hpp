// Products with weights that have no tiles.
#pragma once

#include "src/backend.hpp"

namespace hqq::cpu {

// Any QuantizedTensor, in float32 whatever the mode.
void linear_by_rows(const LinearTask& task, int threads);

}  // namespace hqq::cpu

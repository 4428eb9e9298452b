// Shared by upstream.cpp and upstream_read.cpp.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "hqq/dtype.hpp"
#include "src/io/formats/upstream.hpp"

namespace hqq::upstream {

// "upstream, layer \"...\"", the tag of messages.
std::string where_of(const std::string& name);

// The grid that upstream's reshape of the matrix gives.
struct Grid {
  std::int64_t rows;
  std::int64_t cols;
};
Grid grid_of(int axis, std::int64_t group_size, std::int64_t groups);
// Shape of scale and zero.
std::vector<std::int64_t> metadata_shape(int axis, std::int64_t groups);

// float16, bfloat16 or float32.
bool is_meta_dtype(DType dtype);
std::string torch_name(DType dtype);

// Type and shape of W_q, once check_upstream_holds() has passed.
TensorInfo packed_info(const LayerConfig& config, Grid grid, DType compute_dtype,
                       bool view_as_float, const std::string& name);

}  // namespace hqq::upstream

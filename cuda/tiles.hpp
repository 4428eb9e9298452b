// The packing kCudaTiles seen from the host: which matrices have it, and its sizes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/api.hpp"
#include "cuda/device/format/tile.hpp"
#include "cuda/runtime.hpp"

namespace hqq::cuda {

inline int tile_bits(BitWidth width) { return device::tile_planes(width).bits(); }
inline std::int64_t strips_of(const core::GroupLayout& layout) {
  return div_up(layout.rows, device::kTileRows);
}
inline std::int64_t tiles_of(const core::GroupLayout& layout) {  // of a strip
  return div_up(layout.cols, device::kTileCols);
}
inline device::RowOrder row_order(const core::GroupLayout& layout) {
  return {layout.rows, layout.axis == 1 ? 0 : layout.group_size};
}
inline device::TiledRows tiled_rows(const DeviceMatrix& q) {
  return {q.W_q, q.layout.cols, row_order(q.layout), tiles_of(q.layout)};
}

// Whether the linear kernels have this layout.
bool has_tiles(const core::GroupLayout& layout);
// Whether they multiply x of this type on a device.
bool has_product(DType x_type, const DeviceTraits& device);

// Throw Failure.
void require_tiles(const core::GroupLayout& layout);
void require_product(const core::GroupLayout& layout, DType x_type);
void require_packing(const DeviceMatrix& q, Packing packing);

std::size_t tiles_bytes(const DeviceMatrix& q);

}  // namespace hqq::cuda

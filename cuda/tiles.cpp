#include "cuda/tiles.hpp"

#include <string>

namespace hqq::cuda {
namespace {

// The kernels divide numbers of steps up to 2^15 by multiplying (device::Divider).
constexpr std::int64_t kMaxCols = (std::int64_t{1} << 15) * device::kStepCols;
constexpr std::int64_t kMaxRows = std::int64_t{1} << 30;

// Axis 0: every row of scales serves whole fragments.
bool has_whole_fragments(const core::GroupLayout& layout) {
  return layout.rows % layout.group_size == 0 && layout.group_size % device::kFragmentRows == 0;
}
// Axis 1: groups end where a step of tensor cores ends.
bool has_whole_steps(const core::GroupLayout& layout) {
  return layout.group_size >= layout.cols || layout.group_size % device::kStepCols == 0;
}

const char* name_of(Packing packing) {
  return packing == Packing::kFormat1 ? "format 1" : "CUDA tiles";
}

}  // namespace

bool has_tiles(const core::GroupLayout& layout) {
  if (layout.rows < 1 || layout.cols < 1 || layout.cols > kMaxCols || layout.rows > kMaxRows) {
    return false;
  }
  return layout.axis == 1 ? has_whole_steps(layout) : has_whole_fragments(layout);
}

bool has_product(DType x_type, const DeviceTraits& device) {
  if (x_type == DType::kF16) return device.compute >= 75;
  return x_type == DType::kBF16 && device.compute >= 80;
}

void require_tiles(const core::GroupLayout& layout) {
  if (has_tiles(layout)) return;
  throw Failure(Status::kUnsupported, "no linear kernel has a matrix [" +
                                          std::to_string(layout.rows) + ", " +
                                          std::to_string(layout.cols) + "] in groups of " +
                                          std::to_string(layout.group_size) + " along axis " +
                                          std::to_string(layout.axis));
}

void require_product(const core::GroupLayout& layout, DType x_type) {
  require_tiles(layout);
  const int compute = current_device().compute;
  if (has_product(x_type, current_device())) return;
  throw Failure(Status::kUnsupported, "no linear kernel multiplies type number " +
                                          std::to_string(static_cast<int>(x_type)) +
                                          " on a device of compute capability " +
                                          std::to_string(compute / 10) + "." +
                                          std::to_string(compute % 10));
}

void require_packing(const DeviceMatrix& q, Packing packing) {
  if (q.packing == packing) return;
  throw Failure(Status::kInvalidCall, std::string("codes are in ") + name_of(q.packing) +
                                          "; this call takes " + name_of(packing));
}

std::size_t tiles_bytes(const DeviceMatrix& q) {
  require_product(q.layout, DType::kF16);
  return static_cast<std::size_t>(strips_of(q.layout) * tiles_of(q.layout) *
                                  device::tile_bytes(tile_bits(q.width)));
}

}  // namespace hqq::cuda

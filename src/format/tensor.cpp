#include "hqq/tensor.hpp"

#include <cstdlib>
#include <limits>
#include <new>

#include "hqq/error.hpp"

namespace hqq {

Buffer Buffer::allocate(std::size_t size) {
  // A cache line, and the widest SIMD vector.
  constexpr std::size_t kAlignment = 64;
  const std::size_t rounded = (size + kAlignment - 1) / kAlignment * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, rounded == 0 ? kAlignment : rounded);
  if (memory == nullptr) throw std::bad_alloc();
  return {std::shared_ptr<void>(memory, std::free), static_cast<std::byte*>(memory), size};
}

std::int64_t checked_numel(const std::vector<std::int64_t>& shape, const std::string& where) {
  std::int64_t product = 1;
  for (std::int64_t dimension : shape) {
    if (dimension < 0)
      throw_invalid(where, "shape " + shape_string(shape) + " has a negative size");
    if (dimension != 0 && product > std::numeric_limits<std::int64_t>::max() / dimension) {
      throw_invalid(where, "shape " + shape_string(shape) + " has more elements than 2^63 - 1");
    }
    product *= dimension;
  }
  return product;
}

std::string shape_string(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  return text + "]";
}

Tensor Tensor::allocate(DType dtype, std::vector<std::int64_t> shape) {
  const std::int64_t numel = checked_numel(shape, "tensor");
  const std::size_t size = dtype_size(dtype);
  if (static_cast<std::uint64_t>(numel) > std::numeric_limits<std::size_t>::max() / 2 / size) {
    throw_invalid("tensor", "shape " + shape_string(shape) + " does not fit into memory");
  }
  return {dtype, std::move(shape), Buffer::allocate(static_cast<std::size_t>(numel) * size)};
}

std::int64_t Tensor::numel() const { return checked_numel(shape, "tensor"); }

TensorView::TensorView(const Tensor& tensor) : data(tensor.buffer.data), dtype(tensor.dtype) {
  if (tensor.shape.size() != 2) {
    throw_invalid("tensor", "a matrix is needed, but the shape is " + shape_string(tensor.shape));
  }
  rows = tensor.shape[0];
  cols = row_stride = tensor.shape[1];
}

}  // namespace hqq

// Owning tensors and non-owning views. No arithmetic: only shape, type and bytes.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "hqq/dtype.hpp"

namespace hqq {

// Shared bytes; `owner` keeps them alive, so a Buffer may point into a memory map.
struct Buffer {
  std::shared_ptr<void> owner;
  std::byte* data = nullptr;
  std::size_t size = 0;

  // 64-byte aligned, not initialized.
  static Buffer allocate(std::size_t size);
};

// Product of the dimensions; throws std::invalid_argument when it overflows or one is negative.
std::int64_t checked_numel(const std::vector<std::int64_t>& shape, const std::string& where);
// "[4096, 4096]"
std::string shape_string(const std::vector<std::int64_t>& shape);

// A dense row-major tensor. Default-constructed: absent (`!tensor`).
struct Tensor {
  DType dtype = DType::kU8;
  std::vector<std::int64_t> shape;
  Buffer buffer;

  static Tensor allocate(DType dtype, std::vector<std::int64_t> shape);

  explicit operator bool() const { return buffer.data != nullptr; }
  std::int64_t numel() const;
  std::size_t nbytes() const { return buffer.size; }
  template <class T>
  T* data() {
    return reinterpret_cast<T*>(buffer.data);
  }
  template <class T>
  const T* data() const {
    return reinterpret_cast<const T*>(buffer.data);
  }
};

// A matrix of another library that a TensorView can look at: row-major floats, as a
// hqq::RowMajorMatrix, a Map or a block of one (hqq/eigen.hpp).
template <class Matrix>
concept RowMajorFloats = requires(const Matrix& matrix) {
  { matrix.data() } -> std::convertible_to<const float*>;
  { matrix.rows() } -> std::convertible_to<std::int64_t>;
  { matrix.cols() } -> std::convertible_to<std::int64_t>;
  { matrix.outerStride() } -> std::convertible_to<std::int64_t>;
  requires bool(Matrix::IsRowMajor) && Matrix::InnerStrideAtCompileTime == 1;
};

// A matrix [rows, cols] whose elements are contiguous inside a row; rows are `row_stride` elements
// apart (row_stride >= cols). Does not own its memory.
struct TensorView {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t row_stride = 0;

  TensorView() = default;
  TensorView(const void* data, DType dtype, std::int64_t rows, std::int64_t cols)
      : data(data), dtype(dtype), rows(rows), cols(cols), row_stride(cols) {}
  TensorView(const void* data, DType dtype, std::int64_t rows, std::int64_t cols,
             std::int64_t row_stride)
      : data(data), dtype(dtype), rows(rows), cols(cols), row_stride(row_stride) {}
  template <RowMajorFloats Matrix>
  TensorView(const Matrix& matrix)
      : TensorView(matrix.data(), DType::kF32, matrix.rows(), matrix.cols(), matrix.outerStride()) {
  }
  // Views a 2-D tensor; throws std::invalid_argument for any other number of dimensions.
  explicit TensorView(const Tensor& tensor);

  std::int64_t numel() const { return rows * cols; }
};

}  // namespace hqq

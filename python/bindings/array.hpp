// Arrays of other libraries as strided views of their memory.
#pragma once

#include <pybind11/numpy.h>

#include <memory>
#include <string>
#include <vector>

#include "python/bindings/common.hpp"

namespace hqq::python {

// A strided view; `owner` keeps the memory alive and may be released with or without the GIL.
struct ArrayView {
  DType dtype = DType::kU8;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;  // in bytes
  const std::byte* data = nullptr;
  std::shared_ptr<void> owner;

  bool is_contiguous() const;
};

// A hqq_cpp.Tensor, a NumPy array, anything with __dlpack__ on a CPU (torch tensors, bfloat16
// included, and those that require grad), or what numpy.asarray takes. Never copies where the
// object is one of the first three. Throws std::invalid_argument, naming `where`, for another
// device or element type.
ArrayView view_array(py::handle object, const std::string& where);

// The array as a row-major tensor: shares the memory if it is contiguous, else copies it.
Tensor tensor_from_array(const ArrayView& array);
Tensor tensor_from_python(py::handle object, const std::string& where);

// A matrix whose rows are contiguous: shares the memory where the layout allows, else copies into
// `storage`. Throws std::invalid_argument for another number of dimensions or an element type that
// is not one of the four weight dtypes.
TensorView matrix_from_array(const ArrayView& array, Tensor& storage, const std::string& where,
                             const std::string& name);

// 1-D floats, for importance and biases.
std::vector<float> floats_from_python(py::handle object, const std::string& where,
                                      const std::string& name);

// A NumPy array that shares the tensor's memory, read-only unless nobody else has that memory.
// bfloat16, which NumPy lacks, becomes a float32 copy. Throws std::invalid_argument for the 8-bit
// float types.
py::array numpy_from_tensor(const Tensor& tensor, bool writeable = false);

// DLPack.
py::capsule dlpack_export(const Tensor& tensor, bool versioned);
ArrayView dlpack_import(py::handle object, const std::string& where);

}  // namespace hqq::python

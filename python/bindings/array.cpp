#include "python/bindings/array.hpp"

#include <cstring>

namespace hqq::python {
namespace {

// Keeps a Python object alive from C++ code that may let go of it without the GIL.
std::shared_ptr<void> share_object(py::object object) {
  return std::shared_ptr<void>(object.release().ptr(), [](void* pointer) {
    if (Py_IsInitialized() == 0) return;
    const py::gil_scoped_acquire gil;
    Py_DECREF(static_cast<PyObject*>(pointer));
  });
}

std::string shape_text(const ArrayView& array) { return shape_string(array.shape); }

DType dtype_of(const py::array& array, const std::string& where) {
  const std::string name = py::str(array.dtype().attr("name")).cast<std::string>();
  if (name == "bool") return DType::kBool;
  const std::optional<DType> dtype = dtype_from_name(name);
  // Sizes may differ for a stranger's dtype of the same name.
  if (!dtype || static_cast<std::size_t>(array.itemsize()) != dtype_size(*dtype)) {
    throw_invalid(where, "the array has the dtype " + name + ", which is not supported");
  }
  return *dtype;
}

ArrayView view_numpy(py::array array, const std::string& where) {
  ArrayView view;
  if (!array.dtype().attr("isnative").cast<bool>()) {
    array = array.attr("astype")(array.dtype().attr("newbyteorder")("="));
  }
  view.dtype = dtype_of(array, where);
  view.shape.assign(array.shape(), array.shape() + array.ndim());
  view.strides.assign(array.strides(), array.strides() + array.ndim());
  view.data = static_cast<const std::byte*>(array.data());
  view.owner = share_object(std::move(array));
  return view;
}

ArrayView view_tensor(const Tensor& tensor) {
  ArrayView view{tensor.dtype, tensor.shape, {}, tensor.buffer.data, tensor.buffer.owner};
  view.strides.assign(view.shape.size(), static_cast<std::int64_t>(dtype_size(tensor.dtype)));
  for (std::size_t i = view.shape.size(); i-- > 1;) {
    view.strides[i - 1] = view.strides[i] * view.shape[i];
  }
  return view;
}

// Copies the dimensions from `axis` on to `out`, row-major.
void copy_strided(const ArrayView& array, std::size_t axis, const std::byte* from,
                  std::byte*& out) {
  const std::size_t size = dtype_size(array.dtype);
  if (axis == array.shape.size()) {
    std::memcpy(out, from, size);
    out += size;
    return;
  }
  const bool rows =
      axis + 1 == array.shape.size() && array.strides[axis] == static_cast<std::int64_t>(size);
  if (rows) {
    const std::size_t bytes = static_cast<std::size_t>(array.shape[axis]) * size;
    if (bytes > 0) std::memcpy(out, from, bytes);
    out += bytes;
    return;
  }
  for (std::int64_t i = 0; i < array.shape[axis]; ++i) {
    copy_strided(array, axis + 1, from + i * array.strides[axis], out);
  }
}

Tensor copy_of(const ArrayView& array) {
  Tensor tensor = Tensor::allocate(array.dtype, array.shape);
  std::byte* out = tensor.buffer.data;
  if (tensor.nbytes() > 0) copy_strided(array, 0, array.data, out);
  return tensor;
}

bool is_aligned(const ArrayView& array) {
  return reinterpret_cast<std::uintptr_t>(array.data) % dtype_size(array.dtype) == 0;
}

}  // namespace

bool ArrayView::is_contiguous() const {
  std::int64_t expected = static_cast<std::int64_t>(dtype_size(dtype));
  for (std::size_t i = shape.size(); i-- > 0;) {
    if (shape[i] == 0) return true;
    if (shape[i] != 1 && strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

ArrayView view_array(py::handle object, const std::string& where) {
  if (py::isinstance<Tensor>(object)) return view_tensor(object.cast<const Tensor&>());
  if (py::isinstance<py::array>(object)) {
    return view_numpy(py::reinterpret_borrow<py::array>(object), where);
  }
  if (py::hasattr(object, "__dlpack__")) return dlpack_import(object, where);
  return view_numpy(py::array(py::module_::import("numpy").attr("asarray")(object)), where);
}

Tensor tensor_from_array(const ArrayView& array) {
  if (!array.is_contiguous() || !is_aligned(array) || array.data == nullptr) return copy_of(array);
  const auto size =
      static_cast<std::size_t>(checked_numel(array.shape, "tensor")) * dtype_size(array.dtype);
  // Tensor has one pointer type; nothing in the library writes to a tensor it was given.
  auto* data = const_cast<std::byte*>(array.data);
  return {array.dtype, array.shape, Buffer{array.owner, data, size}};
}

Tensor tensor_from_python(py::handle object, const std::string& where) {
  return tensor_from_array(view_array(object, where));
}

TensorView matrix_from_array(const ArrayView& array, Tensor& storage, const std::string& where,
                             const std::string& name) {
  if (array.shape.size() != 2) {
    throw_invalid(where, name + " has the shape " + shape_text(array) +
                             "; it must be a matrix [out_features, in_features]");
  }
  if (!is_weight_dtype(array.dtype)) {
    throw_invalid(where, name + " is " + std::string(dtype_name(array.dtype)) +
                             "; it must be float32, float16, bfloat16 or float64");
  }
  const std::int64_t rows = array.shape[0], cols = array.shape[1];
  const auto size = static_cast<std::int64_t>(dtype_size(array.dtype));
  const bool dense_rows = cols <= 1 || array.strides[1] == size;
  const bool row_step =
      rows <= 1 || (array.strides[0] % size == 0 && array.strides[0] / size >= cols);
  if (dense_rows && row_step && is_aligned(array)) {
    return {array.data, array.dtype, rows, cols, rows <= 1 ? cols : array.strides[0] / size};
  }
  storage = copy_of(array);
  return TensorView(storage);
}

std::vector<float> floats_from_python(py::handle object, const std::string& where,
                                      const std::string& name) {
  const ArrayView array = view_array(object, where);
  if (array.shape.size() != 1) {
    throw_invalid(where, name + " has the shape " + shape_text(array) + "; it must be 1-D");
  }
  const Tensor tensor = tensor_from_array(array);
  py::object values = numpy_from_tensor(tensor).attr("astype")("float32");
  const auto floats = py::array_t<float, py::array::c_style>(std::move(values));
  return std::vector<float>(floats.data(), floats.data() + floats.size());
}

py::array numpy_from_tensor(const Tensor& tensor, bool writeable) {
  if (tensor.dtype == DType::kF8E4M3 || tensor.dtype == DType::kF8E5M2) {
    throw_invalid("tensor", "NumPy has no " + std::string(dtype_name(tensor.dtype)) +
                                "; torch.from_dlpack reads this tensor");
  }
  if (tensor.dtype == DType::kBF16) {
    // A bfloat16 is the upper half of a float32.
    py::array_t<float> out(std::vector<py::ssize_t>(tensor.shape.begin(), tensor.shape.end()));
    auto* bits = reinterpret_cast<std::uint32_t*>(out.mutable_data());
    const auto* halves = tensor.data<std::uint16_t>();
    for (std::int64_t i = 0; i < tensor.numel(); ++i) {
      bits[i] = static_cast<std::uint32_t>(halves[i]) << 16;
    }
    return out;
  }
  const py::dtype dtype(std::string(dtype_name(tensor.dtype)));
  const std::vector<py::ssize_t> shape(tensor.shape.begin(), tensor.shape.end());
  auto* owner = new std::shared_ptr<void>(tensor.buffer.owner);
  const py::capsule base(owner, [](void* p) { delete static_cast<std::shared_ptr<void>*>(p); });
  py::array array(dtype, shape, tensor.buffer.data, base);
  if (!writeable) array.attr("flags").attr("writeable") = false;
  return array;
}

}  // namespace hqq::python

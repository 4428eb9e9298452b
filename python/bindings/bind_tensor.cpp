// hqq_cpp.Tensor: include/hqq/tensor.hpp.
#include "python/bindings/array.hpp"
#include "python/bindings/dlpack.hpp"

namespace hqq::python {
namespace {

constexpr const char* kTensorDoc =
    R"doc(A read-only array in CPU memory: shape, element type and bytes.

It exists because NumPy has no bfloat16. ``numpy()`` and ``numpy.asarray`` give NumPy arrays,
``torch.from_dlpack`` torch tensors, both without a copy (bfloat16 to NumPy: a float32 copy). Views
keep the memory alive. Do not write to it through torch, which knows no read-only tensors: it may be
a file.

Args:
    array: A NumPy array, a torch tensor, anything with ``__dlpack__`` on a CPU, or what
        ``numpy.asarray`` takes. The memory is shared where the array is contiguous.

Raises:
    ValueError: If the array is not in CPU memory or its element type is not one of safetensors'.

Example:
    >>> import numpy as np
    >>> t = hqq_cpp.Tensor(np.arange(6, dtype=np.float16).reshape(2, 3))
    >>> t
    Tensor(float16, [2, 3])
    >>> t.numpy()[1].tolist()
    [3.0, 4.0, 5.0]
)doc";

constexpr const char* kNumpyDoc = R"doc(The tensor as a NumPy array.

Returns:
    A read-only array that shares the memory, or a float32 copy if the tensor is bfloat16.

Raises:
    ValueError: If the tensor has one of the 8-bit float types, which NumPy lacks.

Example:
    >>> hqq_cpp.Tensor([1.0, 2.0]).numpy().tolist()
    [1.0, 2.0]
)doc";

py::object as_array(const Tensor& tensor, const py::object& dtype, const py::object& copy) {
  py::object array = numpy_from_tensor(tensor);
  const bool converts = !dtype.is_none() && !py::object(array.attr("dtype")).equal(dtype);
  const bool refuses_copy = !copy.is_none() && !copy.cast<bool>();
  if (refuses_copy && (converts || tensor.dtype == DType::kBF16)) {
    throw_invalid("tensor", "a " + std::string(dtype_name(tensor.dtype)) +
                                " tensor cannot become this array without a copy");
  }
  if (converts) return array.attr("astype")(dtype);
  if (!copy.is_none() && copy.cast<bool>()) return array.attr("copy")();
  return array;
}

Tensor deep_copy(const Tensor& tensor) {
  Tensor copy = Tensor::allocate(tensor.dtype, tensor.shape);
  if (tensor.nbytes() > 0) std::memcpy(copy.buffer.data, tensor.buffer.data, tensor.nbytes());
  return copy;
}

py::capsule to_dlpack(const Tensor& tensor, const py::object& stream, const py::object& max_version,
                      const py::object& dl_device, const py::object& copy) {
  if (!stream.is_none() && !stream.equal(py::int_(-1))) {
    throw py::buffer_error("a tensor in CPU memory has no stream; stream must be None");
  }
  if (!dl_device.is_none()) {
    const auto device = dl_device.cast<py::tuple>();
    if (py::int_(device[0]).cast<int>() != dlpack::kCpu) {
      throw py::buffer_error("the tensor is in CPU memory and exports to no other device");
    }
  }
  const bool versioned =
      !max_version.is_none() && max_version.cast<py::tuple>()[0].cast<int>() >= 1;
  return dlpack_export(!copy.is_none() && copy.cast<bool>() ? deep_copy(tensor) : tensor,
                       versioned);
}

py::tuple get_state(const Tensor& tensor) {
  return py::make_tuple(
      std::string(dtype_name(tensor.dtype)), shape_to_python(tensor.shape),
      py::bytes(reinterpret_cast<const char*>(tensor.buffer.data), tensor.nbytes()));
}

Tensor set_state(const py::tuple& state) {
  if (state.size() != 3) throw_format("tensor", "a pickled tensor must have 3 parts");
  const auto dtype = dtype_from_name(state[0].cast<std::string>());
  if (!dtype) throw_format("tensor", "a pickled tensor has an unknown dtype");
  const auto shape = state[1].cast<std::vector<std::int64_t>>();
  const std::string_view bytes = state[2].cast<std::string_view>();
  const auto numel = static_cast<std::uint64_t>(checked_numel(shape, "tensor"));
  if (numel > bytes.size() || numel * dtype_size(*dtype) != bytes.size()) {
    throw_format("tensor", "a pickled tensor of shape " + shape_string(shape) + " has " +
                               std::to_string(bytes.size()) + " bytes");
  }
  Tensor tensor = Tensor::allocate(*dtype, shape);
  std::memcpy(tensor.buffer.data, bytes.data(), bytes.size());
  return tensor;
}

}  // namespace

void bind_tensor(py::module_& m) {
  py::class_<Tensor>(m, "Tensor", kTensorDoc)
      .def(py::init([](const py::object& array) { return tensor_from_python(array, "tensor"); }),
           py::arg("array"))
      .def_property_readonly(
          "dtype", [](const Tensor& t) { return std::string(dtype_name(t.dtype)); },
          "Element type: 'float32', 'bfloat16', 'uint8', ...")
      .def_property_readonly(
          "shape", [](const Tensor& t) -> Shape { return shape_to_python(t.shape); },
          "Sizes of the dimensions.")
      .def_property_readonly(
          "ndim", [](const Tensor& t) { return t.shape.size(); }, "Number of dimensions.")
      .def_property_readonly("size", &Tensor::numel, "Number of elements.")
      .def_property_readonly("nbytes", &Tensor::nbytes, "Bytes of the elements.")
      .def_property_readonly(
          "data_ptr",
          [](const Tensor& t) { return reinterpret_cast<std::uintptr_t>(t.buffer.data); },
          "Address of the first element.")
      .def(
          "numpy", [](const Tensor& t) { return numpy_from_tensor(t); }, kNumpyDoc)
      .def("__array__", &as_array, py::arg("dtype") = py::none(), py::arg("copy") = py::none(),
           "For numpy.asarray: see numpy().")
      .def("__dlpack__", &to_dlpack, py::kw_only(), py::arg("stream") = py::none(),
           py::arg("max_version") = py::none(), py::arg("dl_device") = py::none(),
           py::arg("copy") = py::none(), "For torch.from_dlpack and other consumers of DLPack.")
      .def(
          "__dlpack_device__", [](const Tensor&) { return std::pair<int, int>(dlpack::kCpu, 0); },
          "(1, 0): the CPU.")
      .def("__len__",
           [](const Tensor& t) {
             if (t.shape.empty()) throw py::type_error("a 0-D tensor has no len()");
             return t.shape[0];
           })
      .def("__repr__",
           [](const Tensor& t) {
             return "Tensor(" + std::string(dtype_name(t.dtype)) + ", " + shape_string(t.shape) +
                    ")";
           })
      .def(py::pickle(&get_state, &set_state));
}

}  // namespace hqq::python

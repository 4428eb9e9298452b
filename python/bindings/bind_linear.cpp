// linear: include/hqq/linear.hpp. Its docstring is in hqq_cpp/api.py.
#include "hqq/linear.hpp"
#include "python/bindings/array.hpp"

namespace hqq::python {
namespace {

py::array linear_of(const py::object& x, const QuantizedTensor& q, const py::object& bias,
                    int threads) {
  const Tensor input = tensor_from_python(x, "linear");
  if (input.dtype != DType::kF32 || input.shape.size() != 2) {
    throw_invalid("linear", "x is " + std::string(dtype_name(input.dtype)) + " " +
                                shape_string(input.shape) +
                                "; it must be float32 [M, in_features]");
  }
  std::vector<float> values;
  if (!bias.is_none()) {
    values = floats_from_python(bias, "linear", "bias");
    if (values.empty()) throw_invalid("linear", "bias has 0 values");
  }
  Tensor out;
  {
    const py::gil_scoped_release release;
    const Eigen::Map<const RowMajorMatrix> map(input.data<float>(), input.shape[0], input.shape[1]);
    const RowMajorMatrix y = linear(map, q, values, threads);
    out = Tensor::allocate(DType::kF32, {y.rows(), y.cols()});
    Eigen::Map<RowMajorMatrix>(out.data<float>(), y.rows(), y.cols()) = y;
  }
  return numpy_from_tensor(out, /*writeable=*/true);
}

// The weight of a layer whose tensors someone else owns, by address: what a call from torch costs
// must not grow with the number of its tensors. Addresses are as trusted as the code that passes
// them, which is hqq_cpp/nn/backend.py alone.
class NativeLayer {
 public:
  NativeLayer(const py::object& config, std::int64_t out_features, std::int64_t in_features) {
    prototype_.config = layer_config_from_python(config);
    prototype_.out_features = out_features;
    prototype_.in_features = in_features;
    prototype_.allocate();
    for (auto& [name, tensor] : prototype_.fields()) {
      if (*tensor) tensor->buffer.owner.reset();
    }
    prototype_.validate("layer");
  }

  // `addresses`: those of the tensors in the order of the file, 0 for an absent one.
  void dequantize(const std::vector<std::uintptr_t>& addresses, std::uintptr_t out, int dtype,
                  int threads) const {
    const QuantizedTensor q = at(addresses);
    const py::gil_scoped_release release;
    hqq::dequantize(q, static_cast<DType>(dtype), reinterpret_cast<void*>(out), threads);
  }

  // x [rows, in_features] and y [rows, out_features] of type `dtype`, bias float32 or 0.
  void linear(const std::vector<std::uintptr_t>& addresses, std::uintptr_t x, std::int64_t rows,
              int dtype, std::uintptr_t bias, std::uintptr_t y, int threads) const {
    const QuantizedTensor q = at(addresses);
    const py::gil_scoped_release release;
    std::span<const float> biases;
    if (bias != 0) {
      biases = {reinterpret_cast<const float*>(bias), static_cast<std::size_t>(q.out_features)};
    }
    hqq::linear(TensorView(reinterpret_cast<const void*>(x), static_cast<DType>(dtype), rows,
                           q.in_features),
                q, biases, reinterpret_cast<void*>(y), threads);
  }

 private:
  QuantizedTensor at(const std::vector<std::uintptr_t>& addresses) const {
    QuantizedTensor q = prototype_;
    std::size_t i = 0;
    for (auto& [name, tensor] : q.fields()) {
      if (*tensor) tensor->buffer.data = reinterpret_cast<std::byte*>(addresses.at(i));
      ++i;
    }
    return q;
  }

  QuantizedTensor prototype_;
};

// The code that NativeLayer takes for a dtype.
int dtype_code(const py::object& dtype) {
  return static_cast<int>(
      dtype_from_python(dtype, "dtype", "float32, float16, bfloat16 or float64"));
}

}  // namespace

void bind_linear(py::module_& m) {
  py::class_<NativeLayer>(m, "NativeLayer",
                          "For hqq_cpp.nn: a layer by the addresses of its tensors.")
      .def(py::init<const py::object&, std::int64_t, std::int64_t>(), py::arg("config"),
           py::arg("out_features"), py::arg("in_features"))
      .def("dequantize", &NativeLayer::dequantize, py::arg("addresses"), py::arg("out"),
           py::arg("dtype"), py::arg("threads"))
      .def("linear", &NativeLayer::linear, py::arg("addresses"), py::arg("x"), py::arg("rows"),
           py::arg("dtype"), py::arg("bias"), py::arg("y"), py::arg("threads"));
  m.def("dtype_code", &dtype_code, py::arg("dtype"),
        "The code that NativeLayer takes for a dtype.");
  m.def("linear", &linear_of, py::arg("x"), py::arg("q"), py::arg("bias"), py::arg("threads"),
        "See hqq_cpp.linear.");
}

}  // namespace hqq::python

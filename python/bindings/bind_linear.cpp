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

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear", &linear_of, py::arg("x"), py::arg("q"), py::arg("bias"), py::arg("threads"),
        "See hqq_cpp.linear.");
}

}  // namespace hqq::python

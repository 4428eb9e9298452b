// quantize and dequantize: include/hqq/quantizer.hpp. Their docstrings are in hqq_cpp/api.py.
#include "hqq/quantizer.hpp"
#include "hqq/tiled_tensor.hpp"
#include "python/bindings/array.hpp"
#include "python/bindings/plain.hpp"

namespace hqq::python {
namespace {

constexpr const char* kStatsDoc = R"doc(Errors of the quantized W_r against W, over all weights.

Example:
    >>> import numpy as np
    >>> W = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
    >>> q, stats = hqq_cpp.quantize(W, {"nbits": 4}, stats=True)
    >>> 0 < stats.mean_abs_error < stats.rms_error < stats.max_abs_error
    True
    >>> sorted(stats.to_dict())
    ['max_abs_error', 'mean_abs_error', 'relative_error', 'rms_error']
)doc";

std::pair<QuantizedTensor, QuantizeStats> quantize_matrix(const py::object& W,
                                                          const py::object& config,
                                                          const Text& name,
                                                          const py::object& importance, int threads,
                                                          const Text& device, bool stats) {
  const std::string where = name.empty() ? "quantize" : name.c_str();
  const Quantizer quantizer(matrix_config_from_python(config), Device::parse(device));
  const ArrayView array = view_array(W, where);
  Tensor storage;
  const TensorView matrix = matrix_from_array(array, storage, where, "W");
  std::vector<float> weights;
  if (!importance.is_none()) {
    weights = floats_from_python(importance, where, "importance");
    // For the library an empty span means: none given.
    if (weights.empty() && matrix.cols > 0) {
      throw_invalid(where,
                    "importance has 0 values; W has " + std::to_string(matrix.cols) + " columns");
    }
  }
  std::pair<QuantizedTensor, QuantizeStats> result;
  QuantizeOptions options;
  options.importance = weights;
  options.threads = threads;
  if (stats) options.stats = &result.second;
  const py::gil_scoped_release release;
  result.first = quantizer.quantize(matrix, name, options);
  return result;
}

template <class Q>
py::typing::Union<py::array, Tensor> dequantize_to(const Q& q, const py::object& dtype,
                                                   int threads) {
  const DType type =
      dtype_from_python(dtype, "dequantize", "float32, float16, bfloat16 or float64");
  if (threads < 0) {
    throw_invalid("dequantize", "threads is " + std::to_string(threads) + "; it must be 0 or more");
  }
  Tensor dense = Tensor::allocate(type, {q.out_features, q.in_features});
  {
    const py::gil_scoped_release release;
    dequantize(q, dense.buffer.data, {type, threads});
  }
  if (type == DType::kBF16) return py::cast(std::move(dense));
  return numpy_from_tensor(dense, /*writeable=*/true);
}

}  // namespace

void bind_quantizer(py::module_& m) {
  PlainClass<QuantizeStats>(m, "QuantizeStats", kStatsDoc)
      .field("mean_abs_error", &QuantizeStats::mean_abs_error, "mean |W - W_r|.")
      .field("rms_error", &QuantizeStats::rms_error, "sqrt(mean (W - W_r)^2).")
      .field("max_abs_error", &QuantizeStats::max_abs_error, "max |W - W_r|.")
      .field("relative_error", &QuantizeStats::relative_error,
             "||W - W_r|| / ||W|| (Frobenius); 0 when W is all zeros.");
  m.def("quantize", &quantize_matrix, py::arg("W"), py::arg("config"), py::arg("name"),
        py::arg("importance"), py::arg("threads"), py::arg("device"), py::arg("stats"),
        "See hqq_cpp.quantize.");
  m.def("dequantize", &dequantize_to<QuantizedTensor>, py::arg("q"), py::arg("dtype"),
        py::arg("threads"), "See hqq_cpp.dequantize.");
  m.def("dequantize", &dequantize_to<TiledTensor>, py::arg("q"), py::arg("dtype"),
        py::arg("threads"), "See hqq_cpp.dequantize.");
}

}  // namespace hqq::python

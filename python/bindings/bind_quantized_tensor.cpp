// hqq_cpp.QuantizedTensor: include/hqq/quantized_tensor.hpp.
#include "hqq/bitpack.hpp"
#include "hqq/quantized_tensor.hpp"
#include "python/bindings/matrix.hpp"

namespace hqq::python {
namespace {

constexpr const char* kClassDoc = R"doc(A quantized matrix [out_features, in_features].

W_r = (W_q - zero) * scale * col_scale. Made by ``quantize``, ``Checkpoint.load`` and
``from_tensors``; immutable. Tensors share memory with it and keep that memory alive.

Attributes:
    W_q: uint8 [out_features, bytes a row], codes packed inside the row (docs/format.md).
    scale, zero: meta_dtype, or uint8 codes with quant_scale, quant_zero. [out_features, groups of a
        row] for axis 1; [out_features / group_size, in_features] for axis 0, or [1, groups] when
        group_size does not divide out_features.
    scale_step, scale_offset, zero_step, zero_offset: float32, one per 128 codes: value = code *
        step + offset. None without quant_scale, quant_zero.
    col_scale: meta_dtype [in_features], or None when the layer is not balanced.

Example:
    >>> import numpy as np
    >>> W = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
    >>> q = hqq_cpp.quantize(W, {"nbits": 4, "group_size": 32, "balance": "none"})
    >>> q
    QuantizedTensor([8, 64], nbits=4, group_size=32, axis=1, bits_per_weight=5)
    >>> q.W_q.shape, q.scale.shape, q.col_scale is None
    ((8, 32), (8, 2), True)
)doc";

constexpr const char* kFromTensorsDoc = R"doc(Builds a quantized matrix from its tensors.

Args:
    tensors: Name -> array (NumPy, torch, Tensor, anything with __dlpack__), as ``tensors()`` gives
        them. Contiguous arrays are shared, not copied: do not change them afterwards.
    config: Settings they were made with: a LayerConfig, or a dict of settings.
        balance 'auto' stands for what the presence of col_scale says.
    shape: (out_features, in_features).

Raises:
    ValueError: For an unknown name.
    FormatError: If a tensor is missing, or has another shape or dtype than config and shape demand.

Example:
    >>> import numpy as np
    >>> tensors = {"W_q": np.array([[0b11100100, 0b11100100]], np.uint8),
    ...            "scale": np.array([[0.5]], np.float16), "zero": np.array([[1]], np.float16)}
    >>> q = hqq_cpp.QuantizedTensor.from_tensors(tensors, {"nbits": 2, "group_size": 8}, (1, 8))
    >>> hqq_cpp.dequantize(q)[0, :4].tolist()
    [-0.5, 0.0, 0.5, 1.0]
)doc";

constexpr const char* kTensorsDoc = R"doc(All present tensors by name, in the order of the file.

Example:
    >>> import numpy as np
    >>> q = hqq_cpp.quantize(np.eye(8, dtype=np.float32), {"group_size": 8, "balance": "none"})
    >>> list(q.tensors())
    ['W_q', 'scale', 'zero']
)doc";

constexpr const char* kCodesDoc = R"doc(The codes, unpacked.

Returns:
    uint8 NumPy array [out_features, in_features], a copy.

Example:
    >>> import numpy as np
    >>> W = np.array([[0, 1, 2, 3, 0, 1, 2, 3]], np.float32)
    >>> hqq_cpp.quantize(W, {"nbits": 2, "group_size": 8, "balance": "none"}).codes().tolist()
    [[0, 1, 2, 3, 0, 1, 2, 3]]
)doc";

py::array codes_of(const QuantizedTensor& q) {
  Tensor codes = Tensor::allocate(DType::kU8, {q.out_features, q.in_features});
  const auto cols = static_cast<std::size_t>(q.in_features);
  const auto bytes = static_cast<std::size_t>(packed_row_bytes(q.config.nbits, q.in_features));
  {
    const py::gil_scoped_release release;
    for (std::int64_t row = 0; row < q.out_features; ++row) {
      const auto at = static_cast<std::size_t>(row);
      unpack_row(q.config.nbits, {q.W_q.data<std::uint8_t>() + at * bytes, bytes},
                 {codes.data<std::uint8_t>() + at * cols, cols});
    }
  }
  return numpy_from_tensor(codes, /*writeable=*/true);
}

std::string repr(const QuantizedTensor& q) {
  char bits[32];
  std::snprintf(bits, sizeof(bits), ", bits_per_weight=%.4g)", q.bits_per_weight());
  return "QuantizedTensor(" + describe_matrix(q) + bits;
}

}  // namespace

void bind_quantized_tensor(py::module_& m) {
  py::class_<QuantizedTensor> quantized(m, "QuantizedTensor", kClassDoc);
  bind_fields(quantized);
  quantized
      .def_static("from_tensors", &matrix_from_tensors<QuantizedTensor>, py::arg("tensors"),
                  py::arg("config"), py::arg("shape"), kFromTensorsDoc)
      .def("tensors", &tensors_of<QuantizedTensor>, kTensorsDoc)
      .def("codes", &codes_of, kCodesDoc)
      .def_property_readonly(
          "nbits", [](const QuantizedTensor& q) { return nbits_to_python(q.config.nbits); },
          "8, 6, 5, 4, 3, 2, 1.58 or 1.")
      .def_property_readonly(
          "group_size", [](const QuantizedTensor& q) { return q.config.group_size; },
          "Weights a group has, or None.")
      .def_property_readonly(
          "axis", [](const QuantizedTensor& q) { return q.config.axis; },
          "1: groups inside rows; 0: inside columns.")
      .def_property_readonly("bits_per_weight", &QuantizedTensor::bits_per_weight,
                             "8 * nbytes / (out_features * in_features).")
      .def("__copy__", [](const QuantizedTensor& q) { return q; })
      .def("__repr__", &repr)
      .def(py::pickle(
          [](const QuantizedTensor& q) {
            return py::make_tuple(q.config, py::make_tuple(q.out_features, q.in_features),
                                  tensors_of(q));
          },
          [](const py::tuple& state) {
            if (state.size() != 3) {
              throw_format("from_tensors", "a pickled QuantizedTensor must have 3 parts");
            }
            return matrix_from_tensors<QuantizedTensor>(
                state[2].cast<py::dict>(), state[0],
                state[1].cast<std::pair<std::int64_t, std::int64_t>>());
          }));
}

}  // namespace hqq::python

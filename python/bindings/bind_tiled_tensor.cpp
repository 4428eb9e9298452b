// hqq_cpp.TiledTensor: include/hqq/tiled_tensor.hpp.
#include "hqq/tiled_tensor.hpp"
#include "python/bindings/matrix.hpp"

namespace hqq::python {
namespace {

constexpr const char* kTiledDoc =
    R"doc(A quantized matrix in the order in which the CPU kernels read it.

Made by ``QuantizedTensor.tile``; immutable. linear() is fastest with it: other weights are put into
this order in every call.

Attributes:
    W_q: uint8 [tiles of 16 rows, units of 32 columns, bytes of a unit] (docs/kernels.md).
    scale, zero: [tiles, groups of a row, 16] for axis 1, else as in QuantizedTensor.
    scale_step, scale_offset, zero_step, zero_offset, col_scale: As in QuantizedTensor.

Example:
    >>> import numpy as np
    >>> q = hqq_cpp.quantize(np.eye(64, dtype=np.float32), {"nbits": 3, "balance": "none"})
    >>> t = q.tile()
    >>> t
    TiledTensor([64, 64], nbits=3, group_size=64, axis=1)
    >>> bytes(t.untile().W_q.numpy()) == bytes(q.W_q.numpy())
    True
)doc";

constexpr const char* kTiledFromTensorsDoc = R"doc(Builds a tiled matrix from its tensors, as
QuantizedTensor.from_tensors does.

Raises:
    ValueError: For an unknown name.
    FormatError: If a tensor is missing, or has another shape or dtype than config and shape demand.
)doc";

constexpr const char* kUntileDoc = R"doc(Format 1 again, bit for bit.

Args:
    threads: CPU threads; 0: see default_threads().

Returns:
    A QuantizedTensor.
)doc";

constexpr const char* kRowsDoc = R"doc(Some rows of W_r, as an embedding takes them.

Args:
    rows: Indices of rows.

Returns:
    float32 NumPy array [len(rows), in_features].

Raises:
    ValueError: For an index outside [0, out_features).

Example:
    >>> import numpy as np
    >>> q = hqq_cpp.quantize(np.eye(64, dtype=np.float32), {"nbits": 8, "balance": "none"})
    >>> q.tile().dequantize_rows([3, 3]).shape
    (2, 64)
)doc";

constexpr const char* kTileDoc = R"doc(The matrix in the order in which the CPU kernels read it.

Args:
    threads: CPU threads; 0: see default_threads().

Returns:
    A TiledTensor. It shares col_scale and the like; codes, scale and zero are copies.

Raises:
    ValueError: With axis 0, unless group_size is a multiple of 16 that divides out_features.

Example:
    >>> import numpy as np
    >>> q = hqq_cpp.quantize(np.eye(64, dtype=np.float32), {"nbits": 4, "balance": "none"})
    >>> q.tile().W_q.shape
    (4, 2, 256)
)doc";

std::string tiled_repr(const TiledTensor& q) { return "TiledTensor(" + describe_matrix(q) + ")"; }

py::array rows_of(const TiledTensor& q, const std::vector<std::int64_t>& rows) {
  Tensor out =
      Tensor::allocate(DType::kF32, {static_cast<std::int64_t>(rows.size()), q.in_features});
  {
    const py::gil_scoped_release release;
    dequantize_rows(q, rows, out.buffer.data);
  }
  return numpy_from_tensor(out, /*writeable=*/true);
}

}  // namespace

void bind_tiled_tensor(py::module_& m) {
  py::class_<TiledTensor> tiled(m, "TiledTensor", kTiledDoc);
  bind_fields(tiled);
  tiled
      .def_static("from_tensors", &matrix_from_tensors<TiledTensor>, py::arg("tensors"),
                  py::arg("config"), py::arg("shape"), kTiledFromTensorsDoc)
      .def("tensors", &tensors_of<TiledTensor>, "All present tensors by name.")
      .def(
          "untile",
          [](const TiledTensor& q, int threads) {
            const py::gil_scoped_release release;
            return untile(q, {threads});
          },
          py::arg("threads") = 0, kUntileDoc)
      .def("dequantize_rows", &rows_of, py::arg("rows"), kRowsDoc)
      .def("__repr__", &tiled_repr);
  // Here, where both types have their names.
  py::class_<QuantizedTensor> quantized(m.attr("QuantizedTensor"));
  quantized.def(
      "tile",
      [](const QuantizedTensor& q, int threads) {
        const py::gil_scoped_release release;
        return tile(q, {threads});
      },
      py::arg("threads") = 0, kTileDoc);
  m.def(
      "can_tile",
      [](const LayerConfig& config, std::int64_t out_features, std::int64_t in_features) {
        return can_tile(config, out_features, in_features);
      },
      py::arg("config"), py::arg("out_features"), py::arg("in_features"),
      "Whether there is a TiledTensor of such a matrix.");
}

}  // namespace hqq::python

// linear: include/hqq/linear.hpp. Its docstring is in hqq_cpp/api.py.
#include <deque>
#include <variant>

#include "hqq/linear.hpp"
#include "python/bindings/array.hpp"
#include "src/format/tensor_specs.hpp"

namespace hqq::python {
namespace {

template <class Weight>
py::array linear_of(const py::object& x, const Weight& q, const py::object& bias, const Text& mode,
                    int threads) {
  const ArrayView array = view_array(x, "linear");
  Tensor storage;
  const TensorView rows = matrix_from_array(array, storage, "linear", "x");
  std::vector<float> values;
  if (!bias.is_none()) {
    values = floats_from_python(bias, "linear", "bias");
    if (values.empty()) throw_invalid("linear", "bias has 0 values");
  }
  const LinearOptions options{linear_mode_from_string(mode), threads};
  Tensor y = Tensor::allocate(rows.dtype, {rows.rows, q.out_features});
  {
    const py::gil_scoped_release release;
    linear(rows, q, values, y.buffer.data, options);
  }
  return numpy_from_tensor(y, /*writeable=*/true);
}

// The weight of a layer whose tensors someone else owns, by address: what a call from torch costs
// must not grow with the number of its tensors. Addresses are as trusted as the code that passes
// them, which is hqq_cpp/backends/cpu.py alone.
class NativeLayer {
 public:
  NativeLayer(const LayerConfig& config, std::int64_t out_features, std::int64_t in_features,
              bool tiled) {
    if (tiled) prototype_ = TiledTensor();
    PackedMatrix& q = std::visit([](auto& held) -> PackedMatrix& { return held; }, prototype_);
    q.config = config;
    q.out_features = out_features;
    q.in_features = in_features;
    describe_tensors(q, tiled ? std::get<TiledTensor>(prototype_).specs()
                              : tensor_specs(config, out_features, in_features));
    std::visit([](const auto& held) { held.validate("layer"); }, prototype_);
  }

  // `addresses`: those of the tensors in the order of the file, 0 for an absent one.
  void dequantize(const std::vector<std::uintptr_t>& addresses, std::uintptr_t out, int dtype,
                  int threads) const {
    at(addresses, [&](const auto& q) {
      hqq::dequantize(q, reinterpret_cast<void*>(out), {static_cast<DType>(dtype), threads});
    });
  }

  // rows: int64 [count]; out [count, in_features] of type `dtype`.
  void dequantize_rows(const std::vector<std::uintptr_t>& addresses, std::uintptr_t rows,
                       std::int64_t count, std::uintptr_t out, int dtype) const {
    at(addresses, [&](const auto& q) {
      hqq::dequantize_rows(
          q, {reinterpret_cast<const std::int64_t*>(rows), static_cast<std::size_t>(count)},
          reinterpret_cast<void*>(out), {static_cast<DType>(dtype)});
    });
  }

  // x [rows, in_features], rows `stride` elements apart, and y [rows, out_features] of type
  // `dtype`, bias float32 or 0.
  void linear(const std::vector<std::uintptr_t>& addresses, std::uintptr_t x, std::int64_t rows,
              std::int64_t stride, int dtype, std::uintptr_t bias, std::uintptr_t y, int mode,
              int threads) const {
    at(addresses, [&](const auto& q) {
      std::span<const float> biases;
      if (bias != 0) {
        biases = {reinterpret_cast<const float*>(bias), static_cast<std::size_t>(q.out_features)};
      }
      hqq::linear(TensorView(reinterpret_cast<const void*>(x), static_cast<DType>(dtype), rows,
                             q.in_features, stride),
                  q, biases, reinterpret_cast<void*>(y), {static_cast<LinearMode>(mode), threads});
    });
  }

  // Name, mode and instruction set of the kernel for so many rows of x.
  std::tuple<std::string, std::string, std::string> kernel(std::int64_t rows, int mode) const {
    const LinearKernel kernel = std::visit(
        [&](const auto& q) { return linear_kernel(q, rows, static_cast<LinearMode>(mode)); },
        prototype_);
    return {kernel.name, to_string(kernel.mode), kernel.target};
  }

  // Every row of x [rows, in_features] times the matrix of its expert, tiled. Matrix i of every
  // tensor is steps[i-th tensor] bytes after matrix i - 1; an expert has `parts` that follow each
  // other, and whose results do in y [rows, parts * out_features]. counts: rows of each expert, in
  // order.
  void experts_linear(const std::vector<std::uintptr_t>& addresses,
                      const std::vector<std::uintptr_t>& steps, std::int64_t parts,
                      const std::vector<std::int64_t>& counts, std::uintptr_t x,
                      std::int64_t stride, int dtype, std::uintptr_t y, int mode,
                      int threads) const {
    const auto& prototype = std::get<TiledTensor>(prototype_);
    const py::gil_scoped_release release;
    const auto type = static_cast<DType>(dtype);
    const std::int64_t y_stride = parts * prototype.out_features;
    std::deque<TiledTensor> matrices;
    std::vector<LinearCall> calls;
    std::int64_t row = 0;
    for (std::size_t expert = 0; expert < counts.size(); row += counts[expert++]) {
      if (counts[expert] == 0) continue;
      const auto* x_rows = reinterpret_cast<const std::byte*>(x) +
                           static_cast<std::size_t>(row * stride) * dtype_size(type);
      const TensorView rows(x_rows, type, counts[expert], prototype.in_features, stride);
      for (std::int64_t part = 0; part < parts; ++part) {
        const auto index =
            expert * static_cast<std::size_t>(parts) + static_cast<std::size_t>(part);
        matrices.push_back(prototype);
        place(matrices.back(),
              [&](std::size_t i) { return addresses.at(i) + index * steps.at(i); });
        auto* y_rows = reinterpret_cast<std::byte*>(y) +
                       static_cast<std::size_t>(row * y_stride + part * prototype.out_features) *
                           dtype_size(type);
        calls.push_back({rows, &matrices.back(), {}, y_rows, y_stride});
      }
    }
    hqq::linear(calls, {static_cast<LinearMode>(mode), threads});
  }

 private:
  // Points the tensors of a matrix to address(i), in the order of the file. Memory that somebody
  // freed has the address 0, as in a sharded model between calls.
  template <class Q, class Address>
  static void place(Q& q, Address address) {
    std::size_t i = 0;
    for (auto& [name, tensor] : q.fields()) {
      if (*tensor) {
        tensor->buffer.data = reinterpret_cast<std::byte*>(address(i));
        if (tensor->buffer.data == nullptr) throw_invalid("linear", name + " has no memory");
      }
      ++i;
    }
  }

  // Calls use(matrix) with the tensors at `addresses`, without the GIL.
  template <class Use>
  void at(const std::vector<std::uintptr_t>& addresses, Use use) const {
    const py::gil_scoped_release release;
    std::visit(
        [&](auto q) {
          place(q, [&](std::size_t i) { return addresses.at(i); });
          use(std::as_const(q));
        },
        prototype_);
  }

  std::variant<QuantizedTensor, TiledTensor> prototype_;
};

// The code that NativeLayer takes for a dtype.
int dtype_code(const py::object& dtype) {
  return static_cast<int>(
      dtype_from_python(dtype, "dtype", "float32, float16, bfloat16 or float64"));
}

}  // namespace

void bind_linear(py::module_& m) {
  py::class_<NativeLayer> native(m, "NativeLayer",
                                 "For hqq_cpp.backends: a layer by the addresses of its tensors.");
  native
      .def(py::init<const LayerConfig&, std::int64_t, std::int64_t, bool>(), py::arg("config"),
           py::arg("out_features"), py::arg("in_features"), py::arg("tiled"))
      .def("dequantize", &NativeLayer::dequantize, py::arg("addresses"), py::arg("out"),
           py::arg("dtype"), py::arg("threads"))
      .def("dequantize_rows", &NativeLayer::dequantize_rows, py::arg("addresses"), py::arg("rows"),
           py::arg("count"), py::arg("out"), py::arg("dtype"))
      .def("linear", &NativeLayer::linear, py::arg("addresses"), py::arg("x"), py::arg("rows"),
           py::arg("stride"), py::arg("dtype"), py::arg("bias"), py::arg("y"), py::arg("mode"),
           py::arg("threads"));
  native.def("kernel", &NativeLayer::kernel, py::arg("rows"), py::arg("mode"));
  native.def("experts_linear", &NativeLayer::experts_linear, py::arg("addresses"), py::arg("steps"),
             py::arg("parts"), py::arg("counts"), py::arg("x"), py::arg("stride"), py::arg("dtype"),
             py::arg("y"), py::arg("mode"), py::arg("threads"));
  m.def("dtype_code", &dtype_code, py::arg("dtype"),
        "The code that NativeLayer takes for a dtype.");
  m.def(
      "linear_mode_code",
      [](const Text& mode) { return static_cast<int>(linear_mode_from_string(mode)); },
      py::arg("mode"), "The code that NativeLayer takes for 'auto', 'fast' and 'exact'.");
  m.def("linear", &linear_of<QuantizedTensor>, py::arg("x"), py::arg("q"), py::arg("bias"),
        py::arg("mode"), py::arg("threads"), "See hqq_cpp.linear.");
  m.def("linear", &linear_of<TiledTensor>, py::arg("x"), py::arg("q"), py::arg("bias"),
        py::arg("mode"), py::arg("threads"), "See hqq_cpp.linear.");
}

}  // namespace hqq::python

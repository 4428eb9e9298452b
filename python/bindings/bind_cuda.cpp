// For hqq_cpp/backends/cuda.py: matrices in device memory, by the addresses of their tensors.
// Addresses are as trusted as the code that passes them.
#include <optional>

#include "hqq/quantizer.hpp"
#include "python/bindings/array.hpp"
#include "src/cuda/handles.hpp"
#include "src/cuda/layer.hpp"
#include "src/cuda/linear.hpp"
#include "src/cuda/solve.hpp"
#include "src/quantize/quantize_input.hpp"
#include "src/quantize/solve_params.hpp"

namespace hqq::python {
namespace {

using Address = std::uintptr_t;
using cuda::TensorAddresses;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// A device and a stream.
struct CudaPlace {
  int device;
  Address stream;

  cuda::Place place() const { return {device, pointer(stream)}; }
};

// The weight of a layer in device memory, by the addresses of its tensors.
class CudaLayer {
 public:
  CudaLayer(const LayerConfig& config, std::int64_t out_features, std::int64_t in_features,
            bool tiled)
      : layer_(config, out_features, in_features,
               tiled ? cuda::Packing::kCudaTiles : cuda::Packing::kFormat1) {}

  std::optional<std::size_t> tiles_bytes(int device) const { return layer_.tiles_bytes(device); }
  std::optional<std::int64_t> max_rows(int x_dtype, int device) const {
    return layer_.max_rows(static_cast<DType>(x_dtype), device);
  }

  void pack(const TensorAddresses& addresses, Address tiles, const CudaPlace& place) const {
    const py::gil_scoped_release release;
    layer_.pack(addresses, pointer(tiles), place.place());
  }
  void unpack(const TensorAddresses& addresses, Address W_q, const CudaPlace& place) const {
    const py::gil_scoped_release release;
    layer_.unpack(addresses, pointer<std::uint8_t>(W_q), place.place());
  }

  void dequantize(const TensorAddresses& addresses, Address out, int dtype,
                  const CudaPlace& place) const {
    const py::gil_scoped_release release;
    cuda::dequantize(layer_.matrix(addresses), pointer(out), static_cast<DType>(dtype),
                     place.place());
  }

  // ids: int64 [count]; out [count, in_features].
  void dequantize_rows(const TensorAddresses& addresses, Address ids, std::int64_t count,
                       Address out, int dtype, const CudaPlace& place) const {
    const py::gil_scoped_release release;
    cuda::dequantize_rows(layer_.matrix(addresses), pointer<const std::int64_t>(ids), count,
                          pointer(out), static_cast<DType>(dtype), place.place());
  }

  // x [rows, in_features], bias [out_features] or 0, y [rows, out_features], all of `dtype`.
  bool linear(const TensorAddresses& addresses, Address x, std::int64_t rows, std::int64_t x_stride,
              int dtype, Address bias, Address y, const CudaPlace& place) const {
    const py::gil_scoped_release release;
    cuda::LinearArgs args;
    args.weight = layer_.matrix(addresses);
    set_operands(args, x, rows, x_stride, dtype, bias, y, args.weight.layout.rows);
    return cuda::linear(args, place.place()) == cuda::LinearOutcome::kDone;
  }

  // Matrix `part` of every expert, see cuda::experts_args(). row_begin: int64 [experts + 1] in
  // device memory; y is the first value of the part in rows of y_stride values.
  bool experts_linear(const TensorAddresses& addresses, const cuda::TensorSteps& steps,
                      std::int64_t experts, std::int64_t parts, std::int64_t part,
                      Address row_begin, Address x, std::int64_t rows, std::int64_t x_stride,
                      int dtype, Address bias, Address y, std::int64_t y_stride,
                      const CudaPlace& place) const {
    const py::gil_scoped_release release;
    cuda::LinearArgs args = cuda::experts_args(layer_, addresses, steps, experts, parts, part);
    args.row_begin = pointer<const std::int64_t>(row_begin);
    set_operands(args, x, rows, x_stride, dtype, bias, y, y_stride);
    return cuda::linear(args, place.place()) == cuda::LinearOutcome::kDone;
  }

 private:
  static void set_operands(cuda::LinearArgs& args, Address x, std::int64_t rows,
                           std::int64_t x_stride, int dtype, Address bias, Address y,
                           std::int64_t y_stride) {
    args.x_type = static_cast<DType>(dtype);
    args.x = pointer(x);
    args.rows = rows;
    args.x_stride = x_stride;
    args.bias = pointer(bias);
    args.y = pointer(y);
    args.y_stride = y_stride;
  }

  cuda::Layer layer_;
};

// Quantizes a matrix in device memory; Quantizer::quantize() for one.
class CudaSolver {
 public:
  CudaSolver(const py::object& config, const Text& name, int dtype, std::int64_t rows,
             std::int64_t cols, const py::object& importance)
      : name_(message_name(name)), W_(nullptr, static_cast<DType>(dtype), rows, cols) {
    const HqqConfig settings = matrix_config_from_python(config);
    settings.validate();
    check_shape(W_, name_);
    std::vector<float> weights;
    if (!importance.is_none()) {
      weights = floats_from_python(importance, name_, "importance");
      if (weights.empty()) {
        throw_invalid(name_, "importance has 0 values; W has " + std::to_string(cols) + " columns");
      }
      check_importance(weights, W_, name_);
      importance_ = relative_importance(weights);
    }
    prototype_ = cuda::describe_matrix(
        resolve_settings(layer_settings(settings, name), !importance_.empty()), rows, cols);
  }

  const LayerConfig& config() const { return prototype_.config; }

  std::size_t workspace_bytes(int device) const {
    const cuda::CurrentDevice current(device);
    // Sizes depend on what there is, not on where.
    constexpr Address kSomewhere = 256;
    QuantizeStats stats;
    return importance_bytes() +
           cuda::solve_workspace_bytes(task({}, 0, W_.cols, kSomewhere, &stats));
  }

  // Fills the tensors at `addresses` and waits.
  QuantizeStats solve(Address W, std::int64_t stride, const TensorAddresses& addresses,
                      Address workspace, std::size_t workspace_bytes,
                      const CudaPlace& place) const {
    const py::gil_scoped_release release;
    const cuda::CurrentDevice current(place.device);
    if (!importance_.empty()) {
      cuda::check(cuda::library().copy(pointer(workspace), importance_.data(),
                                       importance_.size() * sizeof(float), pointer(place.stream)),
                  name_);
    }
    QuantizeStats stats;
    cuda::solve(task(addresses, W, stride, workspace, &stats),
                pointer<std::byte>(workspace) + importance_bytes(),
                workspace_bytes - importance_bytes(), pointer(place.stream));
    return stats;
  }

 private:
  std::size_t importance_bytes() const { return cuda::aligned(importance_.size() * sizeof(float)); }

  cuda::DeviceTask task(const TensorAddresses& addresses, Address W, std::int64_t stride,
                        Address importance, QuantizeStats* stats) const {
    cuda::DeviceTask task;
    task.W = TensorView(pointer(W), W_.dtype, W_.rows, W_.cols, stride);
    task.config = prototype_.config;
    if (!importance_.empty()) task.importance = pointer<const float>(importance);
    task.out = cuda::device_matrix(prototype_, addresses);
    task.name = name_;
    task.stats = stats;
    return task;
  }

  std::string name_;
  TensorView W_;
  std::vector<float> importance_;
  QuantizedTensor prototype_;
};

}  // namespace

void bind_cuda(py::module_& m) {
  py::class_<CudaPlace>(m, "CudaPlace", "For hqq_cpp.backends: a device and a stream.")
      .def(py::init<int, Address>(), py::arg("device"), py::arg("stream"));

  py::class_<CudaLayer>(
      m, "CudaLayer",
      "For hqq_cpp.backends: a layer in device memory, by the addresses of its tensors.")
      .def(py::init<const LayerConfig&, std::int64_t, std::int64_t, bool>(), py::arg("config"),
           py::arg("out_features"), py::arg("in_features"), py::arg("tiled"))
      .def("tiles_bytes", &CudaLayer::tiles_bytes, py::arg("device"))
      .def("max_rows", &CudaLayer::max_rows, py::arg("x_dtype"), py::arg("device"))
      .def("pack", &CudaLayer::pack, py::arg("addresses"), py::arg("tiles"), py::arg("place"))
      .def("unpack", &CudaLayer::unpack, py::arg("addresses"), py::arg("W_q"), py::arg("place"))
      .def("dequantize", &CudaLayer::dequantize, py::arg("addresses"), py::arg("out"),
           py::arg("dtype"), py::arg("place"))
      .def("dequantize_rows", &CudaLayer::dequantize_rows, py::arg("addresses"), py::arg("ids"),
           py::arg("count"), py::arg("out"), py::arg("dtype"), py::arg("place"))
      .def("linear", &CudaLayer::linear, py::arg("addresses"), py::arg("x"), py::arg("rows"),
           py::arg("x_stride"), py::arg("dtype"), py::arg("bias"), py::arg("y"), py::arg("place"))
      .def("experts_linear", &CudaLayer::experts_linear, py::arg("addresses"), py::arg("steps"),
           py::arg("experts"), py::arg("parts"), py::arg("part"), py::arg("row_begin"),
           py::arg("x"), py::arg("rows"), py::arg("x_stride"), py::arg("dtype"), py::arg("bias"),
           py::arg("y"), py::arg("y_stride"), py::arg("place"));

  py::class_<CudaSolver>(m, "CudaSolver",
                         "For hqq_cpp.backends: quantizes a matrix in device memory.")
      .def(py::init<const py::object&, const Text&, int, std::int64_t, std::int64_t,
                    const py::object&>(),
           py::arg("config"), py::arg("name"), py::arg("dtype"), py::arg("rows"), py::arg("cols"),
           py::arg("importance"))
      .def_property_readonly("config", &CudaSolver::config)
      .def("workspace_bytes", &CudaSolver::workspace_bytes, py::arg("device"))
      .def("solve", &CudaSolver::solve, py::arg("W"), py::arg("stride"), py::arg("addresses"),
           py::arg("workspace"), py::arg("workspace_bytes"), py::arg("place"));
  m.def("cuda_require_device", &cuda::require_device, py::arg("device"),
        "Raises CudaError unless the kernels can run on this device.");
}

}  // namespace hqq::python

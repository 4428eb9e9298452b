// For hqq_cpp/nn/cuda.py: matrices in device memory, by the addresses of their tensors. Addresses
// are as trusted as the code that passes them.
#include <mutex>
#include <optional>

#include "hqq/quantizer.hpp"
#include "python/bindings/array.hpp"
#include "src/cuda/handles.hpp"
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

// A quantized matrix with shapes and types, and no memory.
QuantizedTensor prototype_of(const LayerConfig& config, std::int64_t rows, std::int64_t cols) {
  QuantizedTensor q;
  q.config = config;
  q.out_features = rows;
  q.in_features = cols;
  q.allocate();
  for (auto& [name, tensor] : q.fields()) {
    if (*tensor) tensor->buffer.owner.reset();
  }
  return q;
}

// False for kUnsupported; throws for what is wrong.
bool done(cuda::Status status, const char* what) {
  if (status == cuda::Status::kUnsupported) return false;
  cuda::check(status, what);
  return true;
}

// Where a call runs.
struct Place {
  int device;
  Address stream;
};

class CudaLayer {
 public:
  CudaLayer(const py::object& config, std::int64_t out_features, std::int64_t in_features)
      : prototype_(prototype_of(layer_config_from_python(config), out_features, in_features)) {
    prototype_.validate("layer");
  }

  void dequantize(const TensorAddresses& addresses, Address out, int dtype,
                  const Place& place) const {
    const py::gil_scoped_release release;
    const cuda::CurrentDevice current(place.device);
    cuda::check(cuda::library().dequantize(matrix(addresses), pointer(out),
                                           static_cast<DType>(dtype), pointer(place.stream)),
                "dequantize");
  }

  // ids: int64 [count]; out [count, in_features].
  void dequantize_rows(const TensorAddresses& addresses, Address ids, std::int64_t count,
                       Address out, int dtype, const Place& place) const {
    const py::gil_scoped_release release;
    const cuda::CurrentDevice current(place.device);
    cuda::check(cuda::library().dequantize_rows(matrix(addresses), pointer<const std::int64_t>(ids),
                                                count, pointer(out), static_cast<DType>(dtype),
                                                pointer(place.stream)),
                "embedding");
  }

  // Bytes of codes and metadata in the order of the fused kernels; None: there are none for this
  // layer.
  std::optional<std::pair<std::size_t, std::size_t>> fused_sizes(int x_dtype, int device) const {
    const cuda::CurrentDevice current(device);
    cuda::FusedSizes sizes{};
    if (!done(cuda::library().fused_sizes(matrix({}), static_cast<DType>(x_dtype), &sizes),
              "linear")) {
      return std::nullopt;
    }
    return std::pair(sizes.codes_bytes, sizes.metadata_bytes);
  }

  std::int64_t fused_max_rows(int x_dtype, int device) const {
    const cuda::CurrentDevice current(device);
    std::int64_t rows = 0;
    cuda::check(cuda::library().fused_max_rows(fused(x_dtype), &rows), "linear");
    return rows;
  }

  // Of a layer that has fused_sizes().
  void repack(const TensorAddresses& addresses, int x_dtype, Address codes, Address metadata,
              const Place& place) const {
    const py::gil_scoped_release release;
    const cuda::CurrentDevice current(place.device);
    cuda::check(cuda::library().repack(matrix(addresses), static_cast<DType>(x_dtype),
                                       pointer(codes), pointer(metadata), pointer(place.stream)),
                "repack");
  }

  cuda::FusedMatrix fused(int x_dtype) const {
    cuda::FusedMatrix matrix;
    matrix.layout = prototype_.layout();
    matrix.width = prototype_.config.nbits;
    matrix.metadata_type = cuda::fused_metadata_type(this->matrix({}));
    matrix.x_type = static_cast<DType>(x_dtype);
    return matrix;
  }

 private:
  cuda::DeviceMatrix matrix(const TensorAddresses& addresses) const {
    return cuda::device_matrix(prototype_, addresses);
  }

  QuantizedTensor prototype_;
};

// Repacked matrices, of one layer or of experts with `parts` matrices each, on one device. What a
// call of linear() costs on the host must stay small: a model has hundreds, and each takes
// microseconds.
class CudaFused {
 public:
  // `weight`: codes, metadata, col_scale; `steps`: bytes between those of matrices. 0 parts: a
  // single matrix.
  CudaFused(const CudaLayer& layer, int x_dtype, int device, const std::array<Address, 3>& weight,
            const std::array<std::int64_t, 3>& steps, std::int64_t experts, std::int64_t parts)
      : device_(device), steps_(steps) {
    args_.weight = layer.fused(x_dtype);
    args_.weight.codes = pointer(weight[0]);
    args_.weight.metadata = pointer(weight[1]);
    args_.weight.col_scale = pointer(weight[2]);
    args_.experts = experts;
    args_.codes_stride = parts * steps[0];
    args_.metadata_stride = parts * steps[1];
    args_.col_scale_stride = parts * steps[2];
  }

  std::size_t workspace_bytes(std::int64_t rows, bool grouped) const {
    const cuda::CurrentDevice current(device_);
    cuda::FusedLinearArgs args = args_;
    args.rows = rows;
    args.x_stride = args.weight.layout.cols;
    args.y_stride = args.weight.layout.rows;
    // Only whether there is one matters.
    static const std::int64_t none = 0;
    if (grouped) args.row_begin = &none;
    std::size_t bytes = 0;
    cuda::check(cuda::library().linear_workspace_bytes(args, &bytes), "linear");
    return bytes;
  }

  // Arguments as FusedLinearArgs has them; matrix `part` of every expert. False: there is no kernel
  // for it on this device.
  bool linear(std::int64_t part, Address row_begin, Address x, std::int64_t rows,
              std::int64_t x_stride, Address bias, Address y, std::int64_t y_stride,
              Address workspace, std::size_t workspace_bytes, Address stream) const {
    const py::gil_scoped_release release;
    const cuda::CurrentDevice current(device_);
    cuda::FusedLinearArgs args = args_;
    const auto move = [&](const void*& address, std::int64_t step) {
      if (address != nullptr) address = static_cast<const std::byte*>(address) + part * step;
    };
    move(args.weight.codes, steps_[0]);
    move(args.weight.metadata, steps_[1]);
    move(args.weight.col_scale, steps_[2]);
    args.row_begin = pointer<const std::int64_t>(row_begin);
    args.x = pointer(x);
    args.rows = rows;
    args.x_stride = x_stride;
    args.bias = pointer(bias);
    args.y = pointer(y);
    args.y_stride = y_stride;
    args.workspace = pointer(workspace);
    args.workspace_bytes = workspace_bytes;
    // Some products are two launches with the workspace between them; another thread on the same
    // stream must not come in.
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    return done(cuda::library().linear(args, pointer(stream)), "linear");
  }

 private:
  int device_;
  std::array<std::int64_t, 3> steps_;
  cuda::FusedLinearArgs args_;
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
    prototype_ = prototype_of(
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
                      Address workspace, std::size_t workspace_bytes, const Place& place) const {
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
  std::size_t importance_bytes() const {
    constexpr std::size_t kAlignment = 256;
    return (importance_.size() * sizeof(float) + kAlignment - 1) / kAlignment * kAlignment;
  }

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
  py::class_<Place>(m, "CudaPlace", "For hqq_cpp.nn: a device and a stream.")
      .def(py::init<int, Address>(), py::arg("device"), py::arg("stream"));

  py::class_<CudaLayer> layer(m, "CudaLayer",
                              "For hqq_cpp.nn: a layer in device memory, by the addresses of its "
                              "tensors.");
  layer
      .def(py::init<const py::object&, std::int64_t, std::int64_t>(), py::arg("config"),
           py::arg("out_features"), py::arg("in_features"))
      .def("dequantize", &CudaLayer::dequantize, py::arg("addresses"), py::arg("out"),
           py::arg("dtype"), py::arg("place"))
      .def("dequantize_rows", &CudaLayer::dequantize_rows, py::arg("addresses"), py::arg("ids"),
           py::arg("count"), py::arg("out"), py::arg("dtype"), py::arg("place"))
      .def("fused_sizes", &CudaLayer::fused_sizes, py::arg("x_dtype"), py::arg("device"))
      .def("fused_max_rows", &CudaLayer::fused_max_rows, py::arg("x_dtype"), py::arg("device"))
      .def("repack", &CudaLayer::repack, py::arg("addresses"), py::arg("x_dtype"), py::arg("codes"),
           py::arg("metadata"), py::arg("place"));
  py::class_<CudaFused>(m, "CudaFused", "For hqq_cpp.nn: matrices in the order of fused kernels.")
      .def(py::init<const CudaLayer&, int, int, const std::array<Address, 3>&,
                    const std::array<std::int64_t, 3>&, std::int64_t, std::int64_t>(),
           py::arg("layer"), py::arg("x_dtype"), py::arg("device"), py::arg("weight"),
           py::arg("steps"), py::arg("experts"), py::arg("parts"))
      .def("workspace_bytes", &CudaFused::workspace_bytes, py::arg("rows"), py::arg("grouped"))
      .def("linear", &CudaFused::linear, py::arg("part"), py::arg("row_begin"), py::arg("x"),
           py::arg("rows"), py::arg("x_stride"), py::arg("bias"), py::arg("y"), py::arg("y_stride"),
           py::arg("workspace"), py::arg("workspace_bytes"), py::arg("stream"));

  py::class_<CudaSolver>(m, "CudaSolver", "For hqq_cpp.nn: quantizes a matrix in device memory.")
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

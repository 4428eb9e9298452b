// hqq::Linear: a weight on the CPU or on a GPU, and the products of each.
#include <type_traits>
#include <variant>

#include "hqq/error.hpp"
#include "hqq/linear.hpp"
#include "src/cuda/device_weight.hpp"
#include "src/linear/check.hpp"

namespace hqq {
namespace {

// Format 1: a small layer that has no tiles on the CPU.
using AnyWeight = std::variant<TiledTensor, QuantizedTensor, cuda::DeviceWeight>;

AnyWeight make_weight(QuantizedTensor q, std::span<const float> bias, const Device& device,
                      int threads) {
  if (device.kind == Device::Kind::kCuda) {
    return AnyWeight(std::in_place_type<cuda::DeviceWeight>, q, bias, device.index);
  }
  if (can_tile(q.config, q.out_features, q.in_features)) return tile(std::move(q), {threads});
  return q;
}

void multiply_on_gpu(const cuda::DeviceWeight& weight, const TensorView& x, void* y,
                     const LinearOptions& options) {
  const Device device = Device::cuda(weight.device());
  if (!weight.is_packed()) {
    const core::GroupLayout& layout = weight.matrix().layout;
    throw_invalid("linear", "no kernel of " + device.str() + " multiplies groups of " +
                                std::to_string(layout.group_size) + " along axis " +
                                std::to_string(layout.axis) +
                                "; dequantize() gives the dense matrix");
  }
  switch (weight.linear(x, y, options.stream)) {
    case cuda::LinearOutcome::kDone:
      return;
    case cuda::LinearOutcome::kNoKernel:
      throw_invalid("linear", "x is " + std::string(dtype_name(x.dtype)) + "; the kernels of " +
                                  device.str() + " take float16" +
                                  " and, from compute capability 8.0 on, bfloat16");
    case cuda::LinearOutcome::kNoWorkspace:
      throw CudaError("[linear] a graph is being recorded and there is no workspace on " +
                      device.str() + " for " + std::to_string(x.rows) +
                      " rows; run the layer once before");
  }
}

void check_dtype(DType dtype) {
  if (is_weight_dtype(dtype)) return;
  throw_invalid("dequantize",
                std::string(dtype_name(dtype)) + " is not float32, float16, bfloat16 or float64");
}

}  // namespace

struct Linear::Impl {
  std::vector<float> bias;
  Device device;
  AnyWeight weight;

  // Calls on_cpu(tensor) or on_gpu(weight).
  template <class OnCpu, class OnGpu>
  decltype(auto) visit(OnCpu on_cpu, OnGpu on_gpu) const {
    return std::visit(
        [&](const auto& held) -> decltype(auto) {
          if constexpr (std::is_same_v<decltype(held), const cuda::DeviceWeight&>) {
            return on_gpu(held);
          } else {
            return on_cpu(held);
          }
        },
        weight);
  }

  // Settings and shape, wherever the weight is.
  const PackedMatrix& matrix() const {
    return visit(
        [](const auto& q) -> const PackedMatrix& { return q; },
        [](const cuda::DeviceWeight& held) -> const PackedMatrix& { return held.description(); });
  }
};

Linear::Linear(QuantizedTensor q, const LinearLayerOptions& options) {
  q.validate("linear");
  check_bias(options.bias.size(), q.out_features);
  impl_ = std::make_unique<Impl>(
      Impl{options.bias, options.device,
           make_weight(std::move(q), options.bias, options.device, options.threads)});
}

Linear::~Linear() = default;
Linear::Linear(Linear&&) noexcept = default;
Linear& Linear::operator=(Linear&&) noexcept = default;

void Linear::operator()(const TensorView& x, void* y, const LinearOptions& options) const {
  impl_->visit([&](const auto& q) { linear(x, q, impl_->bias, y, options); },
               [&](const cuda::DeviceWeight& weight) {
                 check_operands(x, out_features(), in_features(), impl_->bias.size(),
                                options.threads);
                 multiply_on_gpu(weight, x, y, options);
               });
}

void Linear::dequantize(void* out, const DequantizeOptions& options) const {
  check_dtype(options.dtype);
  impl_->visit([&](const auto& q) { hqq::dequantize(q, out, options); },
               [&](const cuda::DeviceWeight& weight) {
                 cuda::dequantize(weight.matrix(), out, options.dtype,
                                  {weight.device(), options.stream});
               });
}

void Linear::rows(std::span<const std::int64_t> ids, void* out,
                  const DequantizeOptions& options) const {
  check_dtype(options.dtype);
  impl_->visit([&](const auto& q) { dequantize_rows(q, ids, out, options); },
               [&](const cuda::DeviceWeight& weight) {
                 cuda::dequantize_rows(weight.matrix(), ids.data(),
                                       static_cast<std::int64_t>(ids.size()), out, options.dtype,
                                       {weight.device(), options.stream});
               });
}

QuantizedTensor Linear::quantized_tensor() const {
  if (const auto* tiled = std::get_if<TiledTensor>(&impl_->weight)) return untile(*tiled);
  if (const auto* q = std::get_if<QuantizedTensor>(&impl_->weight)) return *q;
  return std::get<cuda::DeviceWeight>(impl_->weight).download();
}

void Linear::to(const Device& device, const TileOptions& options) {
  if (device == impl_->device) return;
  // The other device is tried first: nothing changes if it throws.
  AnyWeight moved = make_weight(quantized_tensor(), impl_->bias, device, options.threads);
  impl_->weight = std::move(moved);
  impl_->device = device;
}

const LayerConfig& Linear::config() const { return impl_->matrix().config; }
std::int64_t Linear::out_features() const { return impl_->matrix().out_features; }
std::int64_t Linear::in_features() const { return impl_->matrix().in_features; }
std::span<const float> Linear::bias() const { return impl_->bias; }
const Device& Linear::device() const { return impl_->device; }

std::size_t Linear::nbytes() const {
  return impl_->visit(
      [&](const auto& q) {
        return static_cast<std::size_t>(q.nbytes()) + impl_->bias.size() * sizeof(float);
      },
      [](const cuda::DeviceWeight& weight) { return weight.nbytes(); });
}

}  // namespace hqq

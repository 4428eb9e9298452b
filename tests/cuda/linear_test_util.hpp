// Products from tiles on the shim, and the bound on their error.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/linear/linear.hpp"
#include "cuda/pack.hpp"
#include "cuda/tiles.hpp"
#include "src/format/float_values.hpp"
#include "tests/cpp/support/linear_test_util.hpp"
#include "tests/cuda/device_memory.hpp"

namespace hqq::cuda {

using hqq::testing::DenseLayer;
using hqq::testing::LayerSpec;
using hqq::testing::random_layer;
using hqq::testing::Rng;

inline LayerSpec shape(BitWidth width, int axis, std::optional<std::int64_t> group_size,
                       std::int64_t N, std::int64_t K) {
  LayerSpec spec;
  spec.nbits = width;
  spec.axis = axis;
  spec.group_size = group_size;
  spec.out_features = N;
  spec.in_features = K;
  return spec;
}

// Unit roundoff and half the smallest subnormal number.
inline double unit_of(DType type) { return type == DType::kF16 ? 0x1p-11 : 0x1p-8; }
inline double tiny_of(DType type) { return type == DType::kF16 ? 0x1p-25 : 0x1p-134; }

// 16-bit values that can be read back as doubles.
struct HalfMatrix {
  HalfMatrix(DType type, std::int64_t rows, std::int64_t cols, std::int64_t stride,
             std::int64_t offset = 0)
      : type(type),
        rows(rows),
        cols(cols),
        stride(stride),
        offset(offset),
        memory(static_cast<std::size_t>(offset + std::max<std::int64_t>(rows, 1) * stride)) {
    std::fill_n(memory.data(), memory.size(), kUntouched);
  }
  void randomize(Rng& rng) {
    std::normal_distribution<float> normal;
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < cols; ++c) {
        const float value = normal(rng);
        write_values(std::span(&value, 1), type, reinterpret_cast<std::byte*>(&at(r, c)));
      }
    }
  }
  std::uint16_t* data() const { return memory.data() + offset; }
  std::uint16_t& at(std::int64_t r, std::int64_t c) const { return data()[r * stride + c]; }
  double value(std::int64_t r, std::int64_t c) const {
    double out = 0;
    read_values(type, reinterpret_cast<const std::byte*>(&at(r, c)), std::span(&out, 1));
    return out;
  }
  // Nothing outside the matrix was written.
  bool margins_untouched() const {
    for (std::size_t i = 0; i < memory.size(); ++i) {
      const auto place = static_cast<std::int64_t>(i) - offset;
      const bool inside = place >= 0 && place % stride < cols;
      if (!inside && memory[i] != kUntouched) return false;
    }
    return true;
  }

  static constexpr std::uint16_t kUntouched = 0x7FFF;  // NaN in both types
  DType type;
  std::int64_t rows, cols, stride, offset;
  DeviceArray<std::uint16_t> memory;
};

// Experts of one shape: tiles, and stacks of format-1 metadata.
class PackedLayer {
 public:
  PackedLayer(const LayerSpec& spec, int experts, Rng& rng) {
    for (int e = 0; e < experts; ++e) layers_.push_back(random_layer(spec, rng));
    for (const QuantizedTensor& q : layers_) dense_.emplace_back(q);
    const DeviceCopy first(layers_[0]);
    weight_ = first.matrix();
    weight_.packing = Packing::kCudaTiles;
    const std::size_t bytes = tiles_bytes(weight_);
    tiles_ = DeviceArray<std::byte>(bytes * layers_.size());
    for (std::size_t e = 0; e < layers_.size(); ++e) {
      const DeviceCopy copy(layers_[e]);
      pack(copy.matrix(), tiles_.data() + e * bytes, nullptr);
    }
    weight_.W_q = reinterpret_cast<std::uint8_t*>(tiles_.data());
    strides_.W_q = static_cast<std::int64_t>(bytes);
    stack(&QuantizedTensor::scale, weight_.scale, strides_.scale);
    stack(&QuantizedTensor::zero, weight_.zero, strides_.zero);
    stack(&QuantizedTensor::scale_step, weight_.scale_step, strides_.scale_step);
    stack(&QuantizedTensor::scale_offset, weight_.scale_offset, strides_.scale_offset);
    stack(&QuantizedTensor::zero_step, weight_.zero_step, strides_.zero_step);
    stack(&QuantizedTensor::zero_offset, weight_.zero_offset, strides_.zero_offset);
    stack(&QuantizedTensor::col_scale, weight_.col_scale, strides_.col_scale);
  }

  LinearArgs args(DType x_type) const {
    LinearArgs args;
    args.weight = weight_;
    args.strides = strides_;
    args.experts = static_cast<std::int64_t>(layers_.size());
    args.x_type = x_type;
    return args;
  }
  const DenseLayer& dense(std::size_t expert) const { return dense_[expert]; }

 private:
  // One allocation with the tensor of every expert; null where there is none.
  template <class T>
  void stack(Tensor QuantizedTensor::* tensor, T*& address, std::int64_t& stride) {
    address = nullptr;
    if (!(layers_[0].*tensor)) return;
    const std::size_t size = (layers_[0].*tensor).buffer.size;
    stacks_.emplace_back(size * layers_.size());
    for (std::size_t e = 0; e < layers_.size(); ++e) {
      std::memcpy(stacks_.back().data() + e * size, (layers_[e].*tensor).buffer.data, size);
    }
    address = static_cast<T*>(static_cast<void*>(stacks_.back().data()));
    stride = static_cast<std::int64_t>(size);
  }

  std::vector<QuantizedTensor> layers_;
  std::vector<DenseLayer> dense_;
  DeviceMatrix weight_;
  ExpertStrides strides_;
  DeviceArray<std::byte> tiles_;
  std::vector<DeviceArray<std::byte>> stacks_;
};

// y_n and the most by which a kernel may miss it.
struct Expected {
  double y = 0, error = 0;
};

// docs/cuda-kernels.md, "Error".
inline Expected expected(const DenseLayer& w, BitWidth width, std::int64_t n, const HalfMatrix& x,
                         std::int64_t token, LinearKernel kernel, double bias) {
  const DType type = x.type;
  const double u = unit_of(type), tiny = tiny_of(type);
  const bool sums = kernel != LinearKernel::kGemm && w.layout.axis == 1;
  const double max_part = (1 << device::tile_planes(width).bits()) - 1;
  // bfloat16 codes carry 128 along.
  const double base = type == DType::kF16 ? 0.0 : 128.0;
  Expected e;
  double magnitude = 0;  // of what is added up in float32
  for (std::int64_t k = 0; k < w.cols; ++k) {
    const auto i = static_cast<std::size_t>(n * w.cols + k);
    const double q = w.q[i], s = std::abs(w.s[i]), z = w.z[i];
    const double scaled = x.value(token, k) * w.c[static_cast<std::size_t>(k)];
    const double weight = (q - z) * w.s[i];
    e.y += weight * scaled;
    double x_error = 0;
    // Rounded to float32, then to 16 bits.
    if (w.c[static_cast<std::size_t>(k)] != 1.0)
      x_error = std::abs(scaled) * u * (1 + 0x1p-10) + tiny;
    const double most = std::abs(scaled) + x_error;
    e.error += std::abs(weight) * x_error;
    if (sums) {
      magnitude += s * (q + std::abs(z) + 2 * base) * most;
    } else {
      const double part = std::clamp(std::nearbyint(z), 0.0, max_part);
      const double centered = std::abs(q - part), rest = std::abs(z - part) * s;
      // Roundings: of scale, of rest, of their sum; and 1 % for products of roundings.
      const double rounding =
          1.01 * u * (centered * s + rest + std::abs(weight)) + (centered + 2) * tiny;
      e.error += rounding * most;
      magnitude += (std::abs(weight) + rounding) * most;
    }
  }
  e.y += bias;
  // A tensor core may cut every addend to float32's precision relative to the largest.
  e.error += static_cast<double>(w.cols + 16) * 0x1p-23 * (magnitude + std::abs(bias));
  e.error += u * (std::abs(e.y) + e.error) + tiny;
  return e;
}

}  // namespace hqq::cuda

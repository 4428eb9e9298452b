// Fused products on the shim, and the bound on their error.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/device/tile.hpp"
#include "cuda/linear.hpp"
#include "src/format/float_values.hpp"
#include "tests/cpp/support/linear_test_util.hpp"
#include "tests/cuda/device_memory.hpp"

namespace hqq::cuda {

using hqq::testing::DenseLayer;
using hqq::testing::LayerSpec;
using hqq::testing::random_layer;
using hqq::testing::Rng;

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

// Experts of one shape, repacked.
class FusedLayer {
 public:
  FusedLayer(const LayerSpec& spec, DType x_type, int experts, Rng& rng) : x_type_(x_type) {
    for (int e = 0; e < experts; ++e) layers_.push_back(random_layer(spec, rng));
    for (const QuantizedTensor& q : layers_) dense_.emplace_back(q);
    const DeviceCopy first(layers_[0]);
    sizes_ = fused_sizes(first.matrix(), x_type);
    metadata_type_ = fused_metadata_type(first.matrix());
    codes_ = DeviceArray<std::byte>(sizes_.codes_bytes * layers_.size());
    metadata_ = DeviceArray<std::byte>(sizes_.metadata_bytes * layers_.size());
    std::vector<float> col_scale;
    for (std::size_t e = 0; e < layers_.size(); ++e) {
      const DeviceCopy copy(layers_[e]);
      repack(copy.matrix(), x_type, codes_.data() + e * sizes_.codes_bytes,
             metadata_.data() + e * sizes_.metadata_bytes, nullptr);
      if (!layers_[e].col_scale) continue;
      const std::vector<float> values = read_values(layers_[e].col_scale);
      col_scale.insert(col_scale.end(), values.begin(), values.end());
    }
    if (!col_scale.empty()) col_scale_ = DeviceArray<float>(col_scale);
  }

  FusedLinearArgs args() const {
    FusedLinearArgs args;
    args.weight.layout = layers_[0].layout();
    args.weight.width = layers_[0].config.nbits;
    args.weight.codes = codes_.data();
    args.weight.metadata = metadata_.data();
    args.weight.metadata_type = metadata_type_;
    args.weight.x_type = x_type_;
    args.weight.col_scale = col_scale_.data();
    args.experts = static_cast<std::int64_t>(layers_.size());
    args.codes_stride = static_cast<std::int64_t>(sizes_.codes_bytes);
    args.metadata_stride = static_cast<std::int64_t>(sizes_.metadata_bytes);
    args.col_scale_stride = layers_[0].in_features * static_cast<std::int64_t>(sizeof(float));
    return args;
  }
  const DenseLayer& dense(std::size_t expert) const { return dense_[expert]; }
  const FusedSizes& sizes() const { return sizes_; }
  DType x_type() const { return x_type_; }

 private:
  DType x_type_;
  std::vector<QuantizedTensor> layers_;
  std::vector<DenseLayer> dense_;
  FusedSizes sizes_{};
  DType metadata_type_ = DType::kF16;
  DeviceArray<std::byte> codes_, metadata_;
  DeviceArray<float> col_scale_;
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

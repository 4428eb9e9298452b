// hqq::Quantizer: matrices in, quantized matrices out.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "hqq/config.hpp"
#include "hqq/device.hpp"
#include "hqq/quantized_tensor.hpp"
#include "hqq/tensor.hpp"

namespace hqq {

// Errors of W_r against W over all weights.
struct QuantizeStats {
  double mean_abs_error = 0;  // mean |W - W_r|
  double rms_error = 0;       // sqrt(mean (W - W_r)^2)
  double max_abs_error = 0;   // max |W - W_r|
  double relative_error = 0;  // ||W - W_r|| / ||W|| (Frobenius), 0 when W is all zeros
};

struct QuantizeOptions {
  // Weight of the squared error of each input column, [in_features], finite and >= 0, not all zero;
  // empty: all columns alike.
  std::span<const float> importance;
  // CPU threads; 0: default_threads().
  int threads = 0;
  // Filled when not null.
  QuantizeStats* stats = nullptr;
};

class Quantizer {
 public:
  // Throws std::invalid_argument if the config is invalid.
  explicit Quantizer(HqqConfig config = {}, Device device = Device::cpu());

  const HqqConfig& config() const { return config_; }
  const Device& device() const { return device_; }

  // Quantizes W [out_features, in_features] with the settings of `layer_name` (the defaults when it
  // is empty). Throws std::invalid_argument when the layer is one the config skips, when W is
  // empty, holds NaN or Inf (naming the layer, the first index and the count), or when a scale or
  // zero does not fit config.meta_dtype; CudaError when the device cannot be used or fails. The
  // result does not depend on the number of threads, the CPU or the device.
  QuantizedTensor quantize(const TensorView& W, const std::string& layer_name = "",
                           const QuantizeOptions& options = {}) const;

  // quantize() with explicit settings.
  QuantizedTensor quantize(const TensorView& W, const LayerConfig& config,
                           const std::string& layer_name, const QuantizeOptions& options) const;

 private:
  HqqConfig config_;
  Device device_;
};

struct DequantizeOptions {
  DType dtype = DType::kF32;  // of the result: float32, bfloat16, float16 or float64
  int threads = 0;            // 0: default_threads()
  void* stream = nullptr;     // of a layer on a GPU, see LinearOptions
};

// W_r [out_features, in_features].
Tensor dequantize(const QuantizedTensor& q, const DequantizeOptions& options = {});
// dequantize() into memory of the caller.
void dequantize(const QuantizedTensor& q, void* out, const DequantizeOptions& options = {});
// Rows of W_r [rows.size(), in_features], as an embedding takes them. Throws std::invalid_argument
// for an index outside [0, out_features).
void dequantize_rows(const QuantizedTensor& q, std::span<const std::int64_t> rows, void* out,
                     const DequantizeOptions& options = {});

}  // namespace hqq

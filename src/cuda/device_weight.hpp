// A quantized weight that owns its device memory.
#pragma once

#include <span>

#include "src/cuda/handles.hpp"
#include "src/cuda/layer.hpp"
#include "src/cuda/linear.hpp"

namespace hqq::cuda {

// Its codes are kCudaTiles where the device has a kernel for the layout, else in format 1.
class DeviceWeight {
 public:
  // Copies q and bias ([out_features] or empty) to the device. Waits. Throws CudaError.
  DeviceWeight(const QuantizedTensor& q, std::span<const float> bias, int device);

  // Whether a kernel of the device multiplies this layout.
  bool is_packed() const { return matrix_.packing == Packing::kCudaTiles; }
  const DeviceMatrix& matrix() const { return matrix_; }
  // Its settings and shape, without memory.
  const PackedMatrix& description() const { return description_; }
  int device() const { return device_; }
  // Bytes of device memory.
  std::size_t nbytes() const { return memory_.size(); }

  // y [x.rows, out_features] = x W_r^T + bias, all in device memory. Throws CudaError.
  LinearOutcome linear(const TensorView& x, void* y, StreamHandle stream) const;
  // Format 1 in host memory. Waits. Throws CudaError.
  QuantizedTensor download() const;

 private:
  // Where each tensor and each form of the bias begins in memory_.
  void place_tensors(std::size_t codes_bytes, std::size_t bias_bytes);
  void upload_codes(const QuantizedTensor& q) const;
  void upload_metadata(const QuantizedTensor& q) const;
  void upload_bias(std::span<const float> bias, DType type, std::byte* to) const;

  int device_;
  QuantizedTensor description_;  // shapes and types of format 1, without memory
  DeviceMatrix matrix_;
  TensorAddresses addresses_{};
  // The bias in the types of x that kernels take; null: none.
  std::byte* bias_f16_ = nullptr;
  std::byte* bias_bf16_ = nullptr;
  DeviceMemory memory_;
};

}  // namespace hqq::cuda

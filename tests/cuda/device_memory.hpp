// Tensors in the memory of the shim's device.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <memory>
#include <vector>

#include "cuda/api.hpp"
#include "hqq/quantized_tensor.hpp"

namespace hqq::cuda {

// An allocation of the device that tests read and write as an array.
template <class T>
class DeviceArray {
 public:
  DeviceArray() = default;
  explicit DeviceArray(std::size_t count) : count_(count) {
    void* memory = nullptr;
    if (cudaMalloc(&memory, count * sizeof(T)) != cudaSuccess) throw std::bad_alloc();
    memory_.reset(static_cast<T*>(memory), cudaFree);
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    std::memcpy(data(), values.data(), values.size() * sizeof(T));
  }

  T* data() const { return memory_.get(); }
  std::size_t size() const { return count_; }
  T& operator[](std::size_t i) const { return data()[i]; }
  std::vector<T> values() const { return {data(), data() + count_}; }

 private:
  std::shared_ptr<T> memory_;
  std::size_t count_ = 0;
};

// A quantized matrix with copies of all its tensors.
class DeviceCopy {
 public:
  explicit DeviceCopy(const QuantizedTensor& q) {
    matrix_.layout = q.layout();
    matrix_.width = q.config.nbits;
    matrix_.W_q = static_cast<std::uint8_t*>(copy(q.W_q));
    matrix_.row_bytes = q.W_q.shape[1];
    matrix_.scale_type = q.scale.dtype;
    matrix_.zero_type = q.zero.dtype;
    matrix_.scale = copy(q.scale);
    matrix_.zero = copy(q.zero);
    matrix_.scale_step = static_cast<float*>(copy(q.scale_step));
    matrix_.scale_offset = static_cast<float*>(copy(q.scale_offset));
    matrix_.zero_step = static_cast<float*>(copy(q.zero_step));
    matrix_.zero_offset = static_cast<float*>(copy(q.zero_offset));
    matrix_.col_scale_type = q.col_scale ? q.col_scale.dtype : DType::kF16;
    matrix_.col_scale = copy(q.col_scale);
  }
  const DeviceMatrix& matrix() const { return matrix_; }

 private:
  void* copy(const Tensor& tensor) {
    if (!tensor) return nullptr;
    memory_.emplace_back(tensor.buffer.size);
    std::memcpy(memory_.back().data(), tensor.buffer.data, tensor.buffer.size);
    return memory_.back().data();
  }

  DeviceMatrix matrix_;
  std::vector<DeviceArray<std::byte>> memory_;
};

}  // namespace hqq::cuda

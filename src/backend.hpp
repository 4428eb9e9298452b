// What backends implement: hqq::cpu (src/cpu), and of it hqq::cuda the solver (src/cuda; without
// CUDA every call throws CudaError). Callers validate; backends trust their arguments.
#pragma once

#include <memory>
#include <string>

#include "hqq/linear.hpp"
#include "hqq/quantizer.hpp"

namespace hqq {

// One matrix to quantize. `config` is validated and resolved (group_size set, no kAuto left).
struct QuantizeTask {
  TensorView W;
  LayerConfig config;
  std::span<const float> importance;
  std::string name;
  int threads = 1;
  QuantizeStats* stats = nullptr;
  int device = 0;  // of hqq::cuda
};

// One product y = x W_r^T + bias.
struct LinearTask {
  TensorView x;  // [M, in_features], any weight dtype
  // The weight: one of the two.
  const QuantizedTensor* q = nullptr;
  const TiledTensor* tiled = nullptr;
  std::span<const float> bias;          // [out_features], or empty
  std::byte* y = nullptr;               // [M, out_features] in the type of x
  std::int64_t y_stride = 0;            // elements between rows of y, at least out_features
  LinearMode mode = LinearMode::kFast;  // never kAuto
};

namespace cpu {
// Fills the (allocated) tensors of `out`.
void quantize(const QuantizeTask& task, QuantizedTensor& out);
// Writes W_r to `out` [out_features, in_features] of any weight dtype.
void dequantize(const QuantizedTensor& q, Tensor& out, int threads);
// Products that do not depend on each other, as one.
void linear(std::span<const LinearTask> tasks, int threads);
// What that does; `mode` is not kAuto.
LinearKernel linear_kernel(const PackedMatrix& q, std::int64_t rows, LinearMode mode);
}  // namespace cpu

namespace cuda {
// Gives the bits of cpu::quantize. Memory is taken and released in every call, but see
// keep_memory().
void quantize(const QuantizeTask& task, QuantizedTensor& out);
// While the result lives, calls for this device use again what earlier ones took. Throws CudaError
// if the device cannot be used.
std::shared_ptr<void> keep_memory(int device);
// Whether there is a device that can be used. Throws nothing.
bool is_available();
}  // namespace cuda

}  // namespace hqq

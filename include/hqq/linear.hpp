// y = x W_r^T + bias: hqq::Linear, a layer on the CPU or on a GPU, and the functions under it
// (docs/kernels.md, docs/cuda-kernels.md).
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "hqq/device.hpp"
#include "hqq/quantized_tensor.hpp"
#include "hqq/quantizer.hpp"
#include "hqq/tiled_tensor.hpp"

namespace hqq {

// How a product is computed. kExact: x as it is, sums in float32. kFast: x rounded to int8 in
// blocks of up to 64 with a float32 scale each, integer dot products; the relative error of y is
// about 0.6 % for normally distributed x. kAuto: the environment variable HQQ_CPU_MODE ("fast" or
// "exact"), and kFast without it.
enum class LinearMode { kAuto, kFast, kExact };

std::string to_string(LinearMode mode);
// Throws std::invalid_argument for another name than auto, fast and exact.
LinearMode linear_mode_from_string(const std::string& name);

struct LinearOptions {
  LinearMode mode = LinearMode::kAuto;
  int threads = 0;         // 0: default_threads()
  void* stream = nullptr;  // of a layer on a GPU: a cudaStream_t, null for the default stream
};

// How a Linear is made.
struct LinearLayerOptions {
  std::vector<float> bias;  // [out_features]; empty: none
  Device device{};          // where the weight is kept and multiplied
  int threads = 0;          // for the packing; 0: default_threads()
};

// A linear layer that owns its weight, in the order that the kernels of its device read: the codes
// are reordered once and held once. On the CPU pointers are host memory and a call returns when it
// is done. On a GPU they are memory of the device, and calls are given to options.stream: they
// return before they are done, and a CUDA graph can record them after one product outside.
// Any number of threads may use a layer. A layer that was moved from can only be assigned to.
class Linear {
 public:
  // Throws FormatError if q does not fit its settings, std::invalid_argument for a bias of another
  // length, CudaError if the device cannot be used or has too little memory.
  explicit Linear(QuantizedTensor q, const LinearLayerOptions& options = {});
  ~Linear();
  Linear(Linear&&) noexcept;
  Linear& operator=(Linear&&) noexcept;

  // y [M, out_features] = x [M, in_features] W_r^T + bias, in the type of x; the caller owns y.
  // The CPU takes float32, float16, bfloat16 and float64. A GPU takes float16 and bfloat16 (from
  // compute capability 8.0 on), and layers whose groups the kernels have: axis 1 with a group_size
  // of None or a multiple of 16, axis 0 with a multiple of 16 that divides out_features.
  // `mode` and `threads` are for the CPU. Throws std::invalid_argument for anything else, and
  // CudaError.
  void operator()(const TensorView& x, void* y, const LinearOptions& options = {}) const;

  // W_r [out_features, in_features] to `out`.
  void dequantize(void* out, const DequantizeOptions& options = {}) const;
  // Rows `ids` of W_r to `out` [ids.size(), in_features]: an embedding. On a GPU the ids are memory
  // of the device and must exist; on the CPU one that does not is std::invalid_argument.
  void rows(std::span<const std::int64_t> ids, void* out,
            const DequantizeOptions& options = {}) const;

  // Format 1 again, in host memory, bit for bit what the layer was made of.
  QuantizedTensor quantized_tensor() const;
  // Moves the layer to another device. If it throws, the layer is as it was.
  void to(const Device& device, const TileOptions& options = {});

  const LayerConfig& config() const;
  std::int64_t out_features() const;
  std::int64_t in_features() const;
  std::span<const float> bias() const;
  const Device& device() const;
  // Memory of the device that the weight and the bias take.
  std::size_t nbytes() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// y [M, out_features] = x [M, in_features] W_r^T + bias [out_features] (empty: none). Rows of x and
// y are float32, bfloat16, float16 or float64; y has the type of x, and the caller owns its memory.
// The result does not depend on the number of threads. Throws std::invalid_argument when sizes or
// types do not fit, or HQQ_CPU_MODE is neither fast nor exact.
void linear(const TensorView& x, const TiledTensor& q, std::span<const float> bias, void* y,
            const LinearOptions& options = {});

// What multiplies on a CPU.
struct LinearKernel {
  // "decode": codes are used as they are unpacked, for few rows of x. "panels": some columns are
  // unpacked for many rows. "row by row": the weight has no tiles (can_tile()).
  std::string name;
  LinearMode mode = LinearMode::kExact;  // never kAuto
  std::string target;                    // instruction set, e.g. "AVX2"
};

// What linear() does with a weight (a QuantizedTensor or TiledTensor) and so many rows of x.
// Throws std::invalid_argument when HQQ_CPU_MODE is neither fast nor exact.
LinearKernel linear_kernel(const PackedMatrix& q, std::int64_t rows,
                           LinearMode mode = LinearMode::kAuto);

// One of several products that do not depend on each other.
struct LinearCall {
  TensorView x;
  const TiledTensor* q = nullptr;
  std::span<const float> bias;
  void* y = nullptr;
  std::int64_t y_stride = 0;  // elements between rows of y; 0: out_features
};

// All of them, spread over the threads together: the experts that tokens are routed to, or
// projections of one input. The results are those of one call each.
void linear(std::span<const LinearCall> calls, const LinearOptions& options = {});

// linear() for weights in format 1, whose rows are put into tiles on the way: for a product that is
// computed once. Weights that are used again are faster as a TiledTensor.
void linear(const TensorView& x, const QuantizedTensor& q, std::span<const float> bias, void* y,
            const LinearOptions& options = {});

}  // namespace hqq

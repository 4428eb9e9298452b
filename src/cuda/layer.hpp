// A quantized matrix in device memory, by the addresses of its tensors.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "cuda/api.hpp"
#include "hqq/quantized_tensor.hpp"

namespace hqq::cuda {

// Addresses of the tensors of a matrix in the order of the file, 0 for absent ones.
using TensorAddresses = std::array<std::uintptr_t, kTensorNames.size()>;

// A description with shapes and types, whose tensors have no memory.
QuantizedTensor describe_matrix(const LayerConfig& config, std::int64_t out_features,
                                std::int64_t in_features);

// `q` says shapes and types; its own memory is not looked at.
DeviceMatrix device_matrix(const QuantizedTensor& q, const TensorAddresses& addresses,
                           Packing packing = Packing::kFormat1);

// Where a call runs. Calls return before the work is done, unless they say that they wait.
struct Place {
  int device = 0;
  StreamHandle stream = nullptr;
};

// How to read matrices of one shape, packing and set of settings, wherever their tensors are.
// Addresses are as trusted as the code that passes them. Every function throws CudaError if the
// device or a call fails.
class Layer {
 public:
  // Throws FormatError unless the settings and the shape fit each other.
  Layer(const LayerConfig& config, std::int64_t out_features, std::int64_t in_features,
        Packing packing);

  DeviceMatrix matrix(const TensorAddresses& addresses) const {
    return device_matrix(description_, addresses, packing_);
  }

  // Size of the codes as kCudaTiles; nullopt: no kernel of the device multiplies this layout.
  std::optional<std::size_t> tiles_bytes(int device) const;
  // Rows of x (for one expert, on average) up to which linear() is faster than a dense product;
  // nullopt: no kernel of the device takes this layout and type of x.
  std::optional<std::int64_t> max_rows(DType x_type, int device) const;

  // Copies the codes of a layer in format 1 to `tiles`, and waits: any stream may read them next.
  void pack(const TensorAddresses& addresses, void* tiles, const Place& place) const;
  // Copies the codes of a layer in kCudaTiles to W_q of format 1, bit for bit, and waits.
  void unpack(const TensorAddresses& addresses, std::uint8_t* W_q, const Place& place) const;

 private:
  QuantizedTensor description_;
  Packing packing_;
};

// W_r to `out` [out_features, in_features] of any weight dtype.
void dequantize(const DeviceMatrix& matrix, void* out, DType type, const Place& place);
// Rows `ids` [count] of W_r, which all exist, to `out` [count, in_features]. ids is device memory.
void dequantize_rows(const DeviceMatrix& matrix, const std::int64_t* ids, std::int64_t count,
                     void* out, DType type, const Place& place);

// Whether the stream records a graph. Nothing may be allocated or waited for then.
bool is_recording(StreamHandle stream);

}  // namespace hqq::cuda

// A quantized matrix: format 1 in memory (docs/format.md).
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "hqq/config.hpp"
#include "hqq/core/group.hpp"
#include "hqq/tensor.hpp"

namespace hqq {

// The tensors of a quantized matrix, in the order of files. A layer has those that its settings
// call for.
inline constexpr std::array kTensorNames = {
    "W_q", "scale", "zero", "scale_step", "scale_offset", "zero_step", "zero_offset", "col_scale"};

// What one of them must be.
struct TensorSpec {
  const char* name = "";
  bool present = false;
  DType dtype = DType::kU8;
  std::vector<std::int64_t> shape;

  std::uint64_t nbytes() const;  // 0 if it is not present
};
using TensorSpecs = std::array<TensorSpec, kTensorNames.size()>;

// The tensors of a matrix in format 1, in the order of kTensorNames. Throws std::invalid_argument
// for balance kAuto, which says nothing of a matrix that is there already, and for an empty shape.
TensorSpecs tensor_specs(const LayerConfig& config, std::int64_t out_features,
                         std::int64_t in_features);
// Bytes of all of them.
std::uint64_t nbytes_of(const TensorSpecs& specs);

// Where the weights of each group are; a group_size that is None or too large is resolved.
core::GroupLayout group_layout(const LayerConfig& config, std::int64_t out_features,
                               std::int64_t in_features);

// What a quantized matrix [out_features, in_features] is made of, whatever the order of its codes.
struct PackedMatrix {
  // How it was quantized; nbits, group_size, axis, quant_*, meta_dtype and balance (resolved: never
  // kAuto) say how to read it.
  LayerConfig config;
  std::int64_t out_features = 0;
  std::int64_t in_features = 0;

  Tensor W_q, scale, zero;
  // 8-bit metadata: value = code * step + offset, one pair per core::kMetadataBlock codes in
  // row-major order.
  Tensor scale_step,
      scale_offset;  // float32 [ceil(groups / core::kMetadataBlock)], absent without quant_scale
  Tensor zero_step, zero_offset;  // likewise for quant_zero
  Tensor col_scale;               // meta_dtype [in_features], absent when not balanced

  core::GroupLayout layout() const { return group_layout(config, out_features, in_features); }
  // All present tensors with their names: {"W_q", &W_q}, {"scale", &scale}, ...
  std::vector<std::pair<std::string, const Tensor*>> tensors() const;
  // All of kTensorNames with their (maybe absent) tensors.
  std::vector<std::pair<std::string, Tensor*>> fields();
  std::vector<std::pair<std::string, const Tensor*>> fields() const;
  std::int64_t nbytes() const;
};

// W_r = (W_q - zero) * scale * col_scale.
//   W_q    uint8 [out_features, packed_row_bytes(nbits, in_features)]
//   scale  meta_dtype, or uint8 with quant_scale: [out, ceil(in / group_size)] for axis 1;
//          [out / group_size, in] for axis 0, or [1, groups] when group_size does not divide out
//   zero   meta_dtype, or uint8 with quant_zero; the shape of scale
struct QuantizedTensor : PackedMatrix {
  // Allocates every tensor that config and the features call for. config.balance must be resolved.
  void allocate();
  double bits_per_weight() const;

  // Checks every shape, dtype and size against config and the features; throws FormatError naming
  // `name` and the tensor that does not fit.
  void validate(const std::string& name) const;
};

}  // namespace hqq

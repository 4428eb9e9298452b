// A quantized matrix: format 1 in memory (docs/format.md).
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "hqq/config.hpp"
#include "hqq/core/group.hpp"
#include "hqq/tensor.hpp"

namespace hqq {

// What a quantized matrix [out_features, in_features] is made of, whatever the order of its codes.
struct PackedMatrix {
  // How it was quantized; nbits, group_size, axis, quant_*, meta_dtype and balance (resolved: never
  // kAuto) say how to read it.
  LayerConfig config;
  std::int64_t out_features = 0;
  std::int64_t in_features = 0;

  Tensor W_q, scale, zero;
  // 8-bit metadata: value = code * step + offset, one pair per kMetadataBlock codes in row-major
  // order.
  Tensor scale_step,
      scale_offset;  // float32 [ceil(groups / kMetadataBlock)], absent without quant_scale
  Tensor zero_step, zero_offset;  // likewise for quant_zero
  Tensor col_scale;               // meta_dtype [in_features], absent when not balanced

  static constexpr std::int64_t kMetadataBlock = 128;

  // Where the weights of each group lie; group_size None is resolved.
  core::GroupLayout layout() const;
  // Blocks of kMetadataBlock groups.
  std::int64_t metadata_blocks() const;
  // All present tensors with their format-1 names: {"W_q", &W_q}, {"scale", &scale}, ...
  std::vector<std::pair<std::string, const Tensor*>> tensors() const;
  // All possible names with their (maybe absent) tensors, in the order of the file.
  std::vector<std::pair<std::string, Tensor*>> fields();
  std::int64_t nbytes() const;
};

// W_r = (W_q - zero) * scale * col_scale.
//   W_q    uint8 [out_features, packed_row_bytes(nbits, in_features)]
//   scale  meta_dtype, or uint8 with quant_scale; metadata_shape()
//   zero   meta_dtype, or uint8 with quant_zero; metadata_shape()
struct QuantizedTensor : PackedMatrix {
  // Shape of scale and zero: [out, ceil(in / group_size)] for axis 1; [out / group_size, in] for
  // axis 0, or [1, groups] when group_size does not divide out.
  std::vector<std::int64_t> metadata_shape() const;
  // Allocates every tensor that config and the features call for. config.balance must be resolved.
  void allocate();
  double bits_per_weight() const;

  // Checks every shape, dtype and size against config and the features; throws FormatError naming
  // `name` and the tensor that does not fit.
  void validate(const std::string& name) const;
};

}  // namespace hqq

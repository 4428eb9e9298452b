// A quantized matrix in the order in which the CPU kernels read it (docs/kernels.md, "Tiles").
#pragma once

#include <cstdint>
#include <span>

#include "hqq/quantized_tensor.hpp"
#include "hqq/quantizer.hpp"

namespace hqq {

// The tensors of a QuantizedTensor with rows interleaved by kTileRows, so that a vector register
// holds codes of many rows and no kernel adds across lanes. The same bits, in another order; the
// last tile is padded with zeros, and ternary codes take two bits.
//   W_q          uint8 [tiles, units of 32 columns, 64 * stored bits]
//   scale, zero  axis 1: [tiles, groups of a row, 16]; axis 0: as in the QuantizedTensor
struct TiledTensor : PackedMatrix {
  static constexpr std::int64_t kTileRows = 16;

  // The tensors of a QuantizedTensor, with the shapes above.
  TensorSpecs specs() const;
  // Allocates every tensor that config and the features call for.
  void allocate();
  // Checks shapes, dtypes and sizes; throws FormatError naming `name` and the tensor that does not
  // fit.
  void validate(const std::string& name) const;
};

// Whether a layer has tiles: every one with axis 1; with axis 0, if group_size is a multiple of 16
// and divides out_features.
bool can_tile(const LayerConfig& config, std::int64_t out_features, std::int64_t in_features);

struct TileOptions {
  int threads = 0;  // 0: default_threads()
};

// Reorders a matrix. Give it away (std::move) and its memory is freed as soon as possible. Throws
// std::invalid_argument if can_tile() is false.
TiledTensor tile(QuantizedTensor q, const TileOptions& options = {});
// The inverse, bit for bit.
QuantizedTensor untile(const TiledTensor& q, const TileOptions& options = {});

// As for a QuantizedTensor (quantizer.hpp).
void dequantize(const TiledTensor& q, void* out, const DequantizeOptions& options = {});
void dequantize_rows(const TiledTensor& q, std::span<const std::int64_t> rows, void* out,
                     const DequantizeOptions& options = {});

}  // namespace hqq

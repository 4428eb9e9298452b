// Quantized layers inside format-1 shards: the names of their tensors, their description in the
// shard's metadata, and reading them matrix by matrix (docs/format.md, "Checkpoint folder").
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "hqq/checkpoint.hpp"
#include "src/io/block_pool.hpp"

namespace hqq {

// The key of a shard's __metadata__ whose value is the JSON text that describes its layers.
inline constexpr const char* kLayersMetadataKey = "hqq_cpp";
// The key of config.json's quantization_config that names us, and our name. It is not quant_method:
// Transformers reads weights of a method that it does not know, and loads random ones.
inline constexpr const char* kQuantizerKey = "quantizer";
inline constexpr const char* kQuantizerName = "hqq_cpp";

// What the metadata of a shard says about a layer.
struct LayerDescription {
  std::string name;    // "model.layers.0.mlp.down_proj"
  std::string tensor;  // the dense weight it stands for: the name with ".weight" or as it is
  LayerConfig config;  // resolved
  DType dtype = DType::kBF16;       // of the dense weight
  std::vector<std::int64_t> shape;  // [out, in] or, for fused experts, [experts, out, in]
  bool transposed = false;          // the dense weight is stored as [in, out]: that of a Conv1D

  bool is_fused() const { return shape.size() == 3; }
  std::int64_t matrices() const { return is_fused() ? shape[0] : 1; }
  std::int64_t out_features() const { return shape[shape.size() - 2]; }
  std::int64_t in_features() const { return shape[shape.size() - 1]; }
  std::int64_t numel() const { return matrices() * out_features() * in_features(); }
  std::vector<std::int64_t> dense_shape() const {
    return transposed ? std::vector<std::int64_t>{shape[1], shape[0]} : shape;
  }
  friend bool operator==(const LayerDescription&, const LayerDescription&) = default;
};
// The JSON text for kLayersMetadataKey.
std::string describe_layers(const std::vector<LayerDescription>& layers);

// One stored tensor of a layer: "W_q", "scale", ... and where it lies.
struct StoredField {
  std::string name;
  const TensorInfo* info = nullptr;
  const SafetensorsFile* file = nullptr;
};

// A layer of an open checkpoint, which must outlive it.
struct StoredLayer {
  LayerDescription description;
  std::size_t shard = 0;            // that of W_q; others may lie elsewhere
  std::vector<StoredField> fields;  // those that are there, W_q first
};

// Layers of a file in its order; empty without our metadata. Throws FormatError when the metadata
// is broken or names a layer whose tensors are missing or have other shapes.
std::vector<StoredLayer> read_stored_layers(const SafetensorsFile& file);
// Layers of all shards, in the order of W_q. Any shard may describe any layer, as those do that
// save_pretrained of Transformers writes.
std::vector<StoredLayer> read_stored_layers(const Checkpoint& checkpoint);

// Reads matrix `expert` of a layer. With `map_codes` W_q is a view of the mapped file, for callers
// that need little or nothing of it; with `pool` its memory comes from there.
QuantizedTensor read_matrix(const StoredLayer& layer, std::int64_t expert, bool map_codes = false,
                            BlockPool* pool = nullptr);

// [rows, cols] -> [cols, rows] of the same type.
void transpose_matrix(const Tensor& from, const Tensor& to);

// True if any shard describes quantized layers, or config.json names hqq_cpp as the quantizer or,
// as the first folders do, as the quant_method.
bool is_quantized_by_us(const Checkpoint& checkpoint);

}  // namespace hqq

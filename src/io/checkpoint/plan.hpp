// What will be written where, known before anything is: all sizes follow from shapes.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "hqq/checkpoint.hpp"
#include "src/io/checkpoint/importance.hpp"
#include "src/io/formats/layer_store.hpp"

namespace hqq {

// Part of the work on one output shard: a matrix, or a piece of a tensor that is copied.
struct PlannedStep {
  static constexpr std::size_t kCopy = ~std::size_t{0};

  std::size_t shard = 0;
  std::size_t layer = kCopy;  // index into the layers
  std::int64_t expert = 0;
  const TensorInfo* source = nullptr;
  std::uint64_t offset = 0, size = 0;  // bytes of the source
  bool last_of_shard = false;
};

struct ShardPlan {
  std::string name;
  std::vector<TensorInfo> tensors;  // in the order of the file
  std::map<std::string, std::string> metadata;
  std::vector<PlannedStep> steps;

  // Adds a tensor that is copied byte for byte.
  void copy(const TensorInfo& tensor, std::size_t shard);
  // To be called after the last tensor.
  void end_steps(std::size_t shard);
  std::uint64_t data_bytes() const;
};

struct PlannedLayer {
  LayerDescription description;
  TensorSpecs tensors;  // of one matrix
  const TensorInfo* source = nullptr;
  bool has_importance = false;

  std::uint64_t matrix_bytes_before() const;
  std::uint64_t matrix_bytes_after() const { return nbytes_of(tensors); }
};

struct QuantizePlan {
  std::vector<ShardPlan> shards;
  std::vector<PlannedLayer> layers;
  std::vector<std::string> copied;  // names of 2-D and larger tensors that stay as they are
  std::vector<std::string> warnings;

  std::uint64_t data_bytes() const;
  // The report of a dry run: everything but statistics and time.
  QuantizeReport report() const;
  // model.safetensors.index.json for these shards. `original` is the text of the source's index.
  std::string index_json(const std::string& original) const;
  // The config with balance "auto" resolved: its layer(name) is exactly how each layer was
  // quantized.
  HqqConfig resolved_config(const HqqConfig& config) const;
  // config.json. `original` is that of the source, maybe empty.
  std::string config_json(const std::string& original, const HqqConfig& config) const;
};

// Throws std::invalid_argument when the source is quantized already, when there is nothing to
// quantize or an importance vector does not fit.
QuantizePlan plan_quantization(const Checkpoint& source, const HqqConfig& config,
                               const ImportanceFile& importance);

// Bytes of data that the shards hold.
std::uint64_t total_data_bytes(const std::vector<ShardPlan>& shards);

// The index of the given shards; keeps what else `original` (may be empty) says.
std::string make_index(const std::vector<ShardPlan>& shards, const std::string& original);

// Name of shard `index` in an output folder: that of the source, model.safetensors for a bare file.
std::string output_shard_name(const Checkpoint& source, std::size_t index);

}  // namespace hqq

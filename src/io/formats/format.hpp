// Checkpoint formats. Format 1 is what all of them have in common: a reader gives the tensors of a
// layer in format 1, and a writer makes its own tensors of these. A new format is a reader, a
// writer and a row of checkpoint_formats().
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "hqq/checkpoint.hpp"
#include "src/io/formats/layer_store.hpp"

namespace hqq {

// How a tensor is made: `reads` get what it is made of, on the thread that reads; compute() makes
// it of these, on another.
struct TensorRecipe {
  std::uint64_t input_bytes = 0;
  std::vector<std::function<Tensor()>> reads;
  std::function<Tensor(std::vector<Tensor>)> compute;
};

// A quantized layer of a checkpoint in any format.
struct SourceLayer {
  LayerDescription description;
  std::size_t shard = 0;
  // Tensors of the checkpoint that make up the layer. The result takes the place of the first.
  std::vector<const TensorInfo*> tensors;

  std::uint64_t nbytes() const;
};

// The quantized layers of one checkpoint, which must outlive the reader.
class FormatReader {
 public:
  virtual ~FormatReader() = default;
  // In the order of the checkpoint; empty when none is in this format.
  const std::vector<SourceLayer>& layers() const { return layers_; }
  // The tensor `spec` of tensor_specs() of a layer. Recipes outlive the reader.
  virtual TensorRecipe recipe(std::size_t layer, const TensorSpec& spec) const = 0;

 protected:
  std::vector<SourceLayer> layers_;
};

// A tensor that a writer puts into the result.
struct TargetTensor {
  std::string key;  // its name without that of the layer
  DType dtype = DType::kU8;
  std::vector<std::int64_t> shape;
  // Tensors of format 1 that compute() takes, in this order; absent ones come as Tensor().
  std::vector<std::string> parts;
  std::function<Tensor(std::vector<Tensor>)> compute;
};

// What a writer needs to know of a whole folder.
struct ConvertedModel {
  const std::string& config_json;  // of the source; may be empty
  const std::vector<LayerDescription>& layers;
  const std::vector<std::string>& copied;  // tensors of two and more dimensions that stay dense
};

class FormatWriter {
 public:
  virtual ~FormatWriter() = default;
  // Throws std::invalid_argument for a layer that the format has no place for.
  virtual std::vector<TargetTensor> tensors(const LayerDescription& layer) const = 0;
  // The text for kLayersMetadataKey of a shard; empty: the format describes its layers elsewhere.
  virtual std::string shard_text(const std::vector<LayerDescription>& layers) const = 0;
  virtual std::string config_json(const ConvertedModel& model) const = 0;
  // The settings in the manifest of the folder, where the format has one.
  virtual std::optional<HqqConfig> manifest_config(const ConvertedModel& /*model*/) const {
    return std::nullopt;
  }
};

using TensorSet = std::set<const TensorInfo*>;

struct Format {
  CheckpointFormat id;
  const char* name;    // as users write it
  const char* absent;  // "holds no layer ...": why a checkpoint cannot be converted from it
  // `taken`: tensors of layers in other formats, which may have the same names.
  std::unique_ptr<FormatReader> (*open)(const Checkpoint& source, const TensorSet& taken);
  std::unique_ptr<FormatWriter> (*writer)();
};

// All of them, format 1 first.
const std::vector<Format>& checkpoint_formats();
const Format& format_of(CheckpointFormat id);

// The layers of `source` that can be converted to `target`: those in format 1 or, where that is the
// target, those in the first other format that has some. Throws std::invalid_argument when there
// are none or they are in the target's format already.
std::unique_ptr<FormatReader> open_source(const Checkpoint& source, const Format& target,
                                          const std::string& where);

// format1.cpp
std::unique_ptr<FormatReader> open_format1(const Checkpoint& source, const TensorSet& taken);
std::unique_ptr<FormatWriter> make_format1_writer();
// upstream_format.cpp
std::unique_ptr<FormatReader> open_upstream(const Checkpoint& source, const TensorSet& taken);
std::unique_ptr<FormatWriter> make_upstream_writer();

}  // namespace hqq

// Format 1 as a checkpoint format: its tensors are read and written as they are.
#include "src/io/checkpoint/plan.hpp"
#include "src/io/formats/format.hpp"
#include "src/io/formats/upstream_config.hpp"

namespace hqq {
namespace {

Tensor only(std::vector<Tensor> input) { return std::move(input[0]); }

class Format1Reader : public FormatReader {
 public:
  explicit Format1Reader(const Checkpoint& source) : stored_(read_stored_layers(source)) {
    for (const StoredLayer& layer : stored_) {
      SourceLayer found{layer.description, layer.shard, {}};
      for (const StoredField& field : layer.fields) found.tensors.push_back(field.info);
      layers_.push_back(std::move(found));
    }
  }

  TensorRecipe recipe(std::size_t layer, const TensorSpec& spec) const override {
    for (const StoredField& field : stored_[layer].fields) {
      if (field.name != spec.name) continue;
      return {field.info->nbytes(), {[field] { return field.file->read(*field.info); }}, &only};
    }
    return {};
  }

 private:
  std::vector<StoredLayer> stored_;
};

class Format1Writer : public FormatWriter {
 public:
  std::vector<TargetTensor> tensors(const LayerDescription& layer) const override {
    std::vector<TargetTensor> all;
    for (const TensorSpec& spec :
         tensor_specs(layer.config, layer.out_features(), layer.in_features())) {
      if (spec.present) all.push_back({spec.name, spec.dtype, spec.shape, {spec.name}, &only});
    }
    return all;
  }

  std::string shard_text(const std::vector<LayerDescription>& layers) const override {
    return describe_layers(layers);
  }

  std::string config_json(const ConvertedModel& model) const override {
    QuantizePlan described;
    described.copied = model.copied;
    return described.config_json(model.config_json, *manifest_config(model));
  }

  std::optional<HqqConfig> manifest_config(const ConvertedModel& model) const override {
    return config_of_layers(model.layers, skip_modules_of(model.config_json));
  }
};

}  // namespace

std::unique_ptr<FormatReader> open_format1(const Checkpoint& source, const TensorSet&) {
  return std::make_unique<Format1Reader>(source);
}

std::unique_ptr<FormatWriter> make_format1_writer() { return std::make_unique<Format1Writer>(); }

}  // namespace hqq

// convert_checkpoint: from one format to another (src/io/formats), one tensor at a time.
#include <algorithm>
#include <functional>
#include <iterator>
#include <map>

#include "hqq/checkpoint.hpp"
#include "hqq/error.hpp"
#include "hqq/version.hpp"
#include "src/base/json.hpp"
#include "src/config/config_json.hpp"
#include "src/io/checkpoint/shard_job.hpp"
#include "src/io/checkpoint/source_files.hpp"
#include "src/io/formats/format.hpp"

namespace hqq {
namespace {

namespace fs = std::filesystem;

constexpr const char* kConvertWhere = "convert";

// A tensor of the result: from the tensors of format 1 that the writer asks for.
struct ConvertStep {
  std::string layer;
  std::uint64_t input_bytes = 0;
  std::uint64_t output_bytes = 0;
  std::uint64_t weights = 0;  // those of the layer for the tensor that holds the codes
  std::vector<TensorRecipe> parts;
  std::function<Tensor(std::vector<Tensor>)> compute;
};

// A tensor of an output shard, copied from `source` or made by a step.
struct Output {
  TensorInfo info;
  const TensorInfo* source = nullptr;
  std::size_t step = 0;
};

struct ConvertPlan {
  std::vector<ShardPlan> shards;
  std::vector<ConvertStep> steps;
  std::vector<LayerDescription> layers;
  std::vector<std::string> copied;  // matrices that stay as they are
};

ConvertStep make_step(const FormatReader& reader, std::size_t layer, const TargetTensor& target) {
  const LayerDescription& description = reader.layers()[layer].description;
  ConvertStep step;
  step.layer = description.name;
  step.compute = target.compute;
  const TensorSpecs specs =
      tensor_specs(description.config, description.out_features(), description.in_features());
  for (const std::string& name : target.parts) {
    const auto spec = std::find_if(specs.begin(), specs.end(),
                                   [&](const TensorSpec& one) { return one.name == name; });
    step.parts.push_back(spec->present ? reader.recipe(layer, *spec) : TensorRecipe{});
    step.input_bytes += step.parts.back().input_bytes;
    if (name == kTensorNames[0]) step.weights = static_cast<std::uint64_t>(description.numel());
  }
  return step;
}

// Collects one shard.
class ShardBuilder {
 public:
  ShardBuilder(const FormatReader& reader, const FormatWriter& writer, ConvertPlan& plan)
      : reader_(reader), writer_(writer), plan_(plan) {}

  void copy(const TensorInfo& tensor) {
    outputs_.push_back({tensor, &tensor, 0});
    if (tensor.shape.size() >= 2) plan_.copied.push_back(tensor.name);
  }

  void convert(std::size_t layer) {
    const LayerDescription& description = reader_.layers()[layer].description;
    for (const TargetTensor& target : writer_.tensors(description)) {
      TensorInfo info{description.name + "." + target.key, target.dtype, target.shape, 0, 0};
      info.end = static_cast<std::uint64_t>(checked_numel(info.shape, kConvertWhere)) *
                 dtype_size(info.dtype);
      ConvertStep step = make_step(reader_, layer, target);
      step.output_bytes = info.end;
      outputs_.push_back({std::move(info), nullptr, plan_.steps.size()});
      plan_.steps.push_back(std::move(step));
    }
    layers_.push_back(description);
  }

  // The order of the safetensors library: wide types first, which aligns them all, then by name.
  void finish(const Checkpoint& source, std::size_t index) {
    std::sort(outputs_.begin(), outputs_.end(), [](const Output& a, const Output& b) {
      if (a.info.dtype != b.info.dtype) return a.info.dtype > b.info.dtype;
      return a.info.name < b.info.name;
    });
    ShardPlan shard;
    shard.name = output_shard_name(source, index);
    for (const Output& output : outputs_) {
      if (output.source != nullptr) {
        shard.copy(*output.source, index);
        continue;
      }
      shard.tensors.push_back(output.info);
      shard.steps.push_back({index, output.step, 0, nullptr, 0, 0, false});
    }
    shard.metadata = source.shard(index).metadata();
    shard.metadata.emplace("format", "pt");
    shard.metadata.erase(kLayersMetadataKey);
    const std::string text = layers_.empty() ? "" : writer_.shard_text(layers_);
    if (!text.empty()) shard.metadata[kLayersMetadataKey] = text;
    shard.end_steps(index);
    plan_.shards.push_back(std::move(shard));
    plan_.layers.insert(plan_.layers.end(), layers_.begin(), layers_.end());
  }

 private:
  const FormatReader& reader_;
  const FormatWriter& writer_;
  ConvertPlan& plan_;
  std::vector<Output> outputs_;
  std::vector<LayerDescription> layers_;  // of this shard
};

ConvertPlan make_plan(const Checkpoint& source, const FormatReader& reader,
                      const FormatWriter& writer) {
  std::map<const TensorInfo*, std::size_t> layer_of;
  for (std::size_t i = 0; i < reader.layers().size(); ++i) {
    for (const TensorInfo* tensor : reader.layers()[i].tensors) layer_of[tensor] = i;
  }
  ConvertPlan plan;
  for (std::size_t s = 0; s < source.shard_count(); ++s) {
    ShardBuilder shard(reader, writer, plan);
    for (const TensorInfo& tensor : source.shard(s).tensors()) {
      const auto found = layer_of.find(&tensor);
      if (found == layer_of.end()) {
        shard.copy(tensor);
      } else if (reader.layers()[found->second].tensors.front() == &tensor) {
        shard.convert(found->second);
      }
    }
    shard.finish(source, s);
  }
  return plan;
}

class ConvertJob : public ShardJob {
 public:
  ConvertJob(const Checkpoint& source, const ConvertPlan& plan, OutputFolder& output)
      : ShardJob(source, plan.shards, output), plan_(plan) {}

 protected:
  std::uint64_t matrix_input_bytes(const PlannedStep& step) const override {
    return at(step).input_bytes;
  }
  std::uint64_t matrix_output_bytes(const PlannedStep& step) const override {
    return at(step).output_bytes;
  }
  std::uint64_t matrix_weights(const PlannedStep& step) const override { return at(step).weights; }
  std::int64_t experts(const PlannedStep&) const override { return 1; }
  std::string matrix_name(const PlannedStep& step) const override { return at(step).layer; }

  // What all parts read, one after the other.
  std::vector<Tensor> read_step(const PlannedStep& step) override {
    std::vector<Tensor> all;
    for (const TensorRecipe& part : at(step).parts) {
      for (const auto& read : part.reads) all.push_back(read());
    }
    return all;
  }

  std::vector<Tensor> compute_step(const PlannedStep& step, std::vector<Tensor> input) override {
    std::vector<Tensor> parts;
    auto next = std::make_move_iterator(input.begin());
    for (const TensorRecipe& part : at(step).parts) {
      if (part.reads.empty()) {
        parts.emplace_back();
        continue;
      }
      const auto end = next + static_cast<std::ptrdiff_t>(part.reads.size());
      parts.push_back(part.compute(std::vector<Tensor>(next, end)));
      next = end;
    }
    return {at(step).compute(std::move(parts))};
  }

 private:
  const ConvertStep& at(const PlannedStep& step) const { return plan_.steps[step.layer]; }

  const ConvertPlan& plan_;
};

// config.json, and the manifest of a format that has one.
void write_configs(const Checkpoint& source, const ConvertPlan& plan, const FormatWriter& writer,
                   bool follow_links, OutputFolder& output) {
  const ConvertedModel model{source.config_json(), plan.layers, plan.copied};
  output.write_file("config.json", writer.config_json(model));
  const std::optional<HqqConfig> config = writer.manifest_config(model);
  if (!config) return;
  Manifest manifest;
  manifest.version = kVersion;
  manifest.config = config_to_json(*config);
  manifest.source = without_times(fingerprint_source(source, follow_links));
  manifest.files = output.files();
  output.write_file(kManifestName, manifest_text(manifest));
}

}  // namespace

void convert_checkpoint(const fs::path& source_path, const fs::path& destination,
                        CheckpointFormat to, const CheckpointOptions& options) {
  const Checkpoint source(source_path, options.follow_links);
  const std::vector<std::string> others = other_files_of(source, options.follow_links);
  const Format& target = format_of(to);
  const std::unique_ptr<FormatReader> reader = open_source(source, target, kConvertWhere);
  const std::unique_ptr<FormatWriter> writer = target.writer();
  const ConvertPlan plan = make_plan(source, *reader, *writer);
  OutputFolder output(source_path, destination,
                      {kConvertWhere, options.force, false, nullptr, options.progress});
  check_free_space(kConvertWhere, output.path(), total_data_bytes(plan.shards));

  ConvertJob job(source, plan, output);
  run_pipeline(job, kConvertWhere, options.progress);
  job.check_source(kConvertWhere);
  copy_files(source, others, output);
  if (source.is_sharded()) {
    output.write_file("model.safetensors.index.json", make_index(plan.shards, index_text(source)));
  }
  write_configs(source, plan, *writer, options.follow_links, output);
  output.commit();
}

}  // namespace hqq

// convert_checkpoint: between format 1 and the layout of upstream hqq, one tensor at a time.
#include <algorithm>
#include <functional>
#include <set>

#include "hqq/checkpoint.hpp"
#include "hqq/error.hpp"
#include "hqq/version.hpp"
#include "src/base/json.hpp"
#include "src/io/checkpoint/shard_job.hpp"
#include "src/io/checkpoint/source_files.hpp"
#include "src/io/formats/upstream.hpp"
#include "src/io/formats/upstream_config.hpp"
#include "src/io/formats/upstream_pack.hpp"
#include "src/io/formats/upstream_parts.hpp"

namespace hqq {
namespace {

namespace fs = std::filesystem;

constexpr const char* kConvertWhere = "convert";

// How one tensor of the result is made.
struct Recipe {
  std::string layer;
  std::uint64_t input_bytes = 0;
  std::uint64_t output_bytes = 0;
  std::uint64_t weights = 0;
  std::function<std::vector<Tensor>()> read;
  std::function<Tensor(std::vector<Tensor>)> compute;
};

// A tensor of an output shard, copied from `source` or made by a recipe.
struct Output {
  TensorInfo info;
  const TensorInfo* source = nullptr;
  std::size_t recipe = 0;
};

struct ConvertPlan {
  std::vector<ShardPlan> shards;
  std::vector<Recipe> recipes;
  std::vector<LayerDescription> layers;
  std::vector<std::string> copied;  // matrices that stay as they are
};

// Collects one shard.
class ShardBuilder {
 public:
  explicit ShardBuilder(ConvertPlan& plan) : plan_(plan) {}

  void copy(const TensorInfo& tensor) {
    outputs_.push_back({tensor, &tensor, 0});
    if (tensor.shape.size() >= 2) plan_.copied.push_back(tensor.name);
  }

  void make(const std::string& name, DType dtype, std::vector<std::int64_t> shape, Recipe recipe) {
    TensorInfo info{name, dtype, std::move(shape), 0, 0};
    info.end =
        static_cast<std::uint64_t>(checked_numel(info.shape, kConvertWhere)) * dtype_size(dtype);
    recipe.output_bytes = info.end;
    outputs_.push_back({std::move(info), nullptr, plan_.recipes.size()});
    plan_.recipes.push_back(std::move(recipe));
  }

  // The order of the safetensors library: wide types first, which aligns them all, then by name.
  void finish(const Checkpoint& source, std::size_t index,
              const std::vector<LayerDescription>& layers) {
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
      shard.steps.push_back({index, output.recipe, 0, nullptr, 0, 0, false});
    }
    shard.metadata = source.shard(index).metadata();
    shard.metadata.emplace("format", "pt");
    shard.metadata.erase(kLayersMetadataKey);
    if (!layers.empty()) shard.metadata[kLayersMetadataKey] = describe_layers(layers);
    shard.end_steps(index);
    plan_.shards.push_back(std::move(shard));
  }

 private:
  ConvertPlan& plan_;
  std::vector<Output> outputs_;
};

// ---- format 1 -> upstream ----

// Without info if the layer has none of that name.
StoredField field_of(const StoredLayer& layer, const std::string& name) {
  for (const StoredField& field : layer.fields) {
    if (field.name == name) return field;
  }
  return {name};
}

Recipe pack_recipe(const StoredLayer& layer, const Tensor& form) {
  const StoredField codes = field_of(layer, "W_q");
  const BitWidth width = layer.description.config.nbits;
  const std::int64_t in_features = layer.description.in_features();
  Recipe recipe;
  recipe.input_bytes = codes.info->nbytes();
  recipe.weights = static_cast<std::uint64_t>(layer.description.numel());
  recipe.read = [codes] { return std::vector<Tensor>{codes.file->read(*codes.info)}; };
  recipe.compute = [=](std::vector<Tensor> input) {
    Tensor words = Tensor::allocate(form.dtype, form.shape);
    pack_upstream(width, input[0], in_features, words);
    return words;
  };
  return recipe;
}

Recipe expand_recipe(const StoredLayer& layer, const std::string& key, const Tensor& form) {
  std::vector<StoredField> parts;
  Recipe recipe;
  for (const char* suffix : {"", "_step", "_offset"}) {
    parts.push_back(field_of(layer, key + suffix));
    if (parts.back().info != nullptr) recipe.input_bytes += parts.back().info->nbytes();
  }
  recipe.read = [parts] {
    std::vector<Tensor> tensors;
    for (const StoredField& part : parts) {
      tensors.push_back(part.info == nullptr ? Tensor{} : part.file->read(*part.info));
    }
    return tensors;
  };
  recipe.compute = [form](std::vector<Tensor> input) {
    Tensor out = form;
    fill_upstream_metadata(input[0], input[1], input[2], out);
    return out;
  };
  return recipe;
}

void add_to_upstream(const StoredLayer& layer, ShardBuilder& shard) {
  const LayerDescription& description = layer.description;
  if (description.is_fused()) {
    throw_invalid(upstream::where_of(description.name),
                  "hqq has no experts that share a tensor (this one is " +
                      shape_string(description.shape) + ")");
  }
  const auto layout = upstream_layout(description.config, description.out_features(),
                                      description.in_features(), description.name);
  for (const auto& [key, tensor] : layout) {
    Recipe recipe;
    if (key == "W_q") {
      recipe = pack_recipe(layer, tensor);
    } else if (key == "scale" || key == "zero") {
      recipe = expand_recipe(layer, key, tensor);
    } else {
      recipe.read = [] { return std::vector<Tensor>(); };
      recipe.compute = [tensor = tensor](std::vector<Tensor>) { return tensor; };
    }
    recipe.layer = description.name;
    shard.make(description.name + "." + key, tensor.dtype, tensor.shape, std::move(recipe));
  }
}

ConvertPlan plan_to_upstream(const Checkpoint& source, const std::vector<StoredLayer>& layers) {
  std::map<std::string, const StoredLayer*> by_codes;
  std::set<std::string> fields;
  ConvertPlan plan;
  for (const StoredLayer& layer : layers) {
    plan.layers.push_back(layer.description);
    by_codes[layer.description.name + ".W_q"] = &layer;
    for (const StoredField& field : layer.fields) fields.insert(field.info->name);
  }
  for (std::size_t s = 0; s < source.shard_count(); ++s) {
    ShardBuilder shard(plan);
    for (const TensorInfo& tensor : source.shard(s).tensors()) {
      const auto layer = by_codes.find(tensor.name);
      if (layer != by_codes.end()) {
        add_to_upstream(*layer->second, shard);
      } else if (!fields.contains(tensor.name)) {
        shard.copy(tensor);
      }
    }
    shard.finish(source, s, {});
  }
  return plan;
}

// ---- upstream -> format 1 ----

// A tensor of the source, wherever it lies.
struct Located {
  const SafetensorsFile* file = nullptr;
  const TensorInfo* info = nullptr;

  Tensor read(std::uint64_t offset, std::uint64_t size) const {
    Tensor bytes = Tensor::allocate(DType::kU8, {static_cast<std::int64_t>(size)});
    file->read(*info, offset, {bytes.buffer.data, bytes.buffer.size});
    return bytes;
  }
};

struct UpstreamSource {
  std::string name;
  std::map<std::string, Located> tensors;  // by key, without bias
  UpstreamLayer layer;
};

// Bytes of the small tensors, types and shapes of the others.
std::map<std::string, Tensor> small_tensors(const std::map<std::string, Located>& tensors) {
  constexpr std::uint64_t kSmall = 512;
  std::map<std::string, Tensor> result;
  for (const auto& [key, located] : tensors) {
    const TensorInfo& info = *located.info;
    result[key] =
        info.nbytes() <= kSmall ? located.file->read(info) : Tensor{info.dtype, info.shape, {}};
  }
  return result;
}

UpstreamSource open_layer(const Checkpoint& source, const std::string& name) {
  UpstreamSource found;
  found.name = name;
  std::vector<std::string> keys = upstream_keys();
  keys.push_back("zero_scale");
  for (const std::string& key : keys) {
    const auto [info, shard] = source.find(name + "." + key);
    if (info != nullptr && key != "bias") found.tensors[key] = {&source.shard(shard), info};
  }
  found.layer = parse_upstream(small_tensors(found.tensors), name);
  return found;
}

Recipe unpack_recipe(const UpstreamSource& source, const TensorSpec& spec) {
  const Located words = source.tensors.at("W_q");
  const BitWidth width = source.layer.config.nbits;
  const std::int64_t in_features = source.layer.in_features;
  const std::string where = upstream::where_of(source.name);
  Recipe recipe;
  recipe.input_bytes = words.info->nbytes();
  recipe.weights = static_cast<std::uint64_t>(source.layer.out_features * in_features);
  recipe.read = [words] { return std::vector<Tensor>{words.file->read(*words.info)}; };
  recipe.compute = [=](std::vector<Tensor> input) {
    Tensor rows = Tensor::allocate(spec.dtype, spec.shape);
    unpack_upstream(width, input[0], in_features, rows, where);
    return rows;
  };
  return recipe;
}

Recipe metadata_recipe(const UpstreamSource& source, const TensorSpec& spec) {
  const bool stacked = source.layer.zero_scale;
  const std::string field = spec.name;
  const Located located = source.tensors.at(stacked ? "zero_scale" : field);
  const std::uint64_t offset = stacked && field == "scale" ? spec.nbytes() : 0;
  Recipe recipe;
  recipe.input_bytes = spec.nbytes();
  recipe.read = [located, offset, size = spec.nbytes()] {
    return std::vector<Tensor>{located.read(offset, size)};
  };
  recipe.compute = [](std::vector<Tensor> input) { return input[0]; };
  return recipe;
}

LayerDescription add_from_upstream(const UpstreamSource& source, ShardBuilder& shard) {
  const UpstreamLayer& layer = source.layer;
  for (const TensorSpec& spec : tensor_specs(layer.config, layer.out_features, layer.in_features)) {
    if (!spec.present) continue;
    const std::string field = spec.name;
    Recipe recipe = field == "W_q" ? unpack_recipe(source, spec) : metadata_recipe(source, spec);
    recipe.layer = source.name;
    shard.make(source.name + "." + field, spec.dtype, spec.shape, std::move(recipe));
  }
  LayerDescription description;
  description.name = source.name;
  description.tensor = source.name + ".weight";
  description.config = layer.config;
  description.dtype = layer.options.compute_dtype.value_or(layer.config.meta_dtype);
  description.shape = {layer.out_features, layer.in_features};
  return description;
}

ConvertPlan plan_from_upstream(const Checkpoint& source) {
  constexpr std::string_view kCodes = ".W_q";
  std::map<std::string, UpstreamSource> by_codes;
  std::set<std::string> used;
  for (std::size_t s = 0; s < source.shard_count(); ++s) {
    for (const TensorInfo& tensor : source.shard(s).tensors()) {
      if (!tensor.name.ends_with(kCodes)) continue;
      const std::string name = tensor.name.substr(0, tensor.name.size() - kCodes.size());
      const auto layer = by_codes.emplace(tensor.name, open_layer(source, name)).first;
      for (const auto& [key, located] : layer->second.tensors) used.insert(located.info->name);
    }
  }
  ConvertPlan plan;
  for (std::size_t s = 0; s < source.shard_count(); ++s) {
    ShardBuilder shard(plan);
    const std::size_t first = plan.layers.size();
    for (const TensorInfo& tensor : source.shard(s).tensors()) {
      const auto layer = by_codes.find(tensor.name);
      if (layer != by_codes.end()) {
        plan.layers.push_back(add_from_upstream(layer->second, shard));
      } else if (!used.contains(tensor.name)) {
        shard.copy(tensor);
      }
    }
    shard.finish(source, s,
                 {plan.layers.begin() + static_cast<std::ptrdiff_t>(first), plan.layers.end()});
  }
  return plan;
}

class ConvertJob : public ShardJob {
 public:
  ConvertJob(const Checkpoint& source, const ConvertPlan& plan, OutputFolder& output)
      : ShardJob(source, plan.shards, output), plan_(plan) {}

 protected:
  std::uint64_t matrix_input_bytes(const PlannedStep& step) const override {
    return recipe(step).input_bytes;
  }
  std::uint64_t matrix_output_bytes(const PlannedStep& step) const override {
    return recipe(step).output_bytes;
  }
  std::uint64_t matrix_weights(const PlannedStep& step) const override {
    return recipe(step).weights;
  }
  std::int64_t experts(const PlannedStep&) const override { return 1; }
  std::string matrix_name(const PlannedStep& step) const override { return recipe(step).layer; }
  std::vector<Tensor> read_step(const PlannedStep& step) override { return recipe(step).read(); }
  std::vector<Tensor> compute_step(const PlannedStep& step, std::vector<Tensor> input) override {
    return {recipe(step).compute(std::move(input))};
  }

 private:
  const Recipe& recipe(const PlannedStep& step) const { return plan_.recipes[step.layer]; }

  const ConvertPlan& plan_;
};

ConvertPlan make_plan(const Checkpoint& source, CheckpointFormat to) {
  const std::string shown = quote_text(source.path().string());
  if (to == CheckpointFormat::kUpstream) {
    const std::vector<StoredLayer> layers = read_stored_layers(source);
    if (layers.empty()) {
      throw_invalid(kConvertWhere,
                    shown + " holds no layer in format 1 of hqq_cpp; quantize it first");
    }
    return plan_to_upstream(source, layers);
  }
  if (is_quantized_by_us(source)) {
    throw_invalid(kConvertWhere, shown + " is in format 1 of hqq_cpp already");
  }
  ConvertPlan plan = plan_from_upstream(source);
  if (plan.layers.empty()) {
    throw_invalid(kConvertWhere, shown + " holds no layer of hqq: no tensor is named <layer>.W_q");
  }
  return plan;
}

// config.json, and for format 1 the manifest.
void write_configs(const Checkpoint& source, const ConvertPlan& plan, CheckpointFormat to,
                   bool follow_links, OutputFolder& output) {
  const std::string& original = source.config_json();
  if (to == CheckpointFormat::kUpstream) {
    output.write_file("config.json", upstream_config_json(original, plan.layers));
    return;
  }
  const HqqConfig config = config_of_layers(plan.layers, skip_modules_of(original));
  QuantizePlan described;
  described.copied = plan.copied;
  output.write_file("config.json", described.config_json(original, config));
  Manifest manifest;
  manifest.version = kVersion;
  manifest.config = config.to_json();
  manifest.source = without_times(fingerprint_source(source, follow_links));
  manifest.files = output.files();
  output.write_file(kManifestName, manifest_text(manifest));
}

}  // namespace

void convert_checkpoint(const fs::path& source_path, const fs::path& destination,
                        CheckpointFormat to, const CheckpointOptions& options) {
  const Checkpoint source(source_path, options.follow_links);
  const std::vector<std::string> others = other_files_of(source, options.follow_links);
  const ConvertPlan plan = make_plan(source, to);
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
  write_configs(source, plan, to, options.follow_links, output);
  output.commit();
}

}  // namespace hqq

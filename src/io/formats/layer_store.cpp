#include "src/io/formats/layer_store.hpp"

#include <algorithm>
#include <cstring>
#include <map>

#include "hqq/bitpack.hpp"
#include "hqq/error.hpp"
#include "hqq/version.hpp"
#include "src/base/json.hpp"
#include "src/config/config_json.hpp"

namespace hqq {
namespace {

using Json = nlohmann::ordered_json;

std::string where_of(const SafetensorsFile& file) {
  return "checkpoint, " + quote_text(file.path().filename().string());
}

std::int64_t read_dimension(const Json& value, const std::string& where) {
  if (!value.is_number_integer() || value.get<std::int64_t>() < 1) {
    throw_format(where, "shape must hold integers of at least 1");
  }
  return value.get<std::int64_t>();
}

LayerDescription parse_layer(const std::string& name, const Json& json, const std::string& where) {
  if (!json.is_object()) throw_format(where, "its description must be an object");
  LayerDescription layer;
  layer.name = name;
  // What is left after taking out our own keys is a LayerConfig.
  Json config = json;
  for (const char* key : {"tensor", "dtype", "shape"}) {
    if (!config.contains(key)) throw_format(where, std::string("its description lacks ") + key);
    config.erase(key);
  }
  const Json& tensor = json["tensor"];
  if (tensor != name && tensor != name + ".weight") {
    throw_format(where, "tensor must be the layer name with or without .weight");
  }
  layer.tensor = tensor.get<std::string>();
  const Json& dtype = json["dtype"];
  const auto parsed = dtype.is_string() ? dtype_from_name(dtype.get<std::string>()) : std::nullopt;
  if (!parsed || !is_weight_dtype(*parsed)) {
    throw_format(where, "dtype must be float64, float32, float16 or bfloat16");
  }
  layer.dtype = *parsed;
  const Json& shape = json["shape"];
  if (!shape.is_array() || shape.size() < 2 || shape.size() > 3) {
    throw_format(where, "shape must have 2 or 3 dimensions");
  }
  for (const Json& dimension : shape) layer.shape.push_back(read_dimension(dimension, where));
  try {
    // Keeps sizes in bits and rounded-up group counts inside 64 bits.
    constexpr std::int64_t kMaxWeights = std::int64_t{1} << 56;
    if (checked_numel(layer.shape, where) > kMaxWeights) {
      throw_format(where, "shape " + shape_string(layer.shape) + " has more than 2^56 weights");
    }
    layer.config = layer_config_from_json(config, LayerConfig{}, where);
  } catch (const std::invalid_argument& error) {
    throw FormatError(error.what());
  }
  if (layer.config.balance == Balance::kAuto) {
    throw_format(where, "balance must be none or sinkhorn in a description");
  }
  return layer;
}

std::map<std::string, LayerDescription> parse_layers(const SafetensorsFile& file,
                                                     const std::string& text) {
  const std::string where = where_of(file);
  const Json json = parse_json(text, where + ", metadata hqq_cpp");
  const auto version = json.is_object() ? json.find("format_version") : json.end();
  if (version == json.end() || !version->is_number_integer()) {
    throw_format(where, "metadata hqq_cpp must be an object with a format_version");
  }
  if (*version != kFormatVersion) {
    throw_format(where, "format_version is " + version->dump() + "; this library reads version " +
                            std::to_string(kFormatVersion));
  }
  const auto layers = json.find("layers");
  if (layers == json.end() || !layers->is_object()) {
    throw_format(where, "metadata hqq_cpp must hold an object named layers");
  }
  std::map<std::string, LayerDescription> result;
  for (const auto& [name, description] : layers->items()) {
    result.emplace(name, parse_layer(name, description, where + ", layer " + quote_text(name)));
  }
  const auto transposed = json.find("transposed");
  if (transposed == json.end()) return result;
  if (!transposed->is_array()) {
    throw_format(where, "transposed in metadata hqq_cpp must be a list of layers");
  }
  for (const Json& name : *transposed) {
    const auto layer = name.is_string() ? result.find(name.get<std::string>()) : result.end();
    if (layer == result.end() || layer->second.is_fused()) {
      throw_format(where, "transposed in metadata hqq_cpp names " + quote_text(name.dump()) +
                              ", which is no matrix that it describes");
    }
    layer->second.transposed = true;
  }
  return result;
}

// Shapes and types follow from the description; a file that says otherwise is refused before any of
// its data is read.
void check_fields(const StoredLayer& layer, const std::string& where) {
  const LayerDescription& description = layer.description;
  TensorSpecs specs =
      tensor_specs(description.config, description.out_features(), description.in_features());
  for (TensorSpec& spec : specs) {
    if (!spec.present) continue;
    if (description.is_fused()) spec.shape.insert(spec.shape.begin(), description.matrices());
    const auto found = std::find_if(layer.fields.begin(), layer.fields.end(),
                                    [&](const auto& field) { return field.name == spec.name; });
    if (found == layer.fields.end()) {
      throw_format(where,
                   "tensor " + quote_text(description.name + "." + spec.name) + " is missing");
    }
    const TensorInfo& info = *found->info;
    if (info.dtype != spec.dtype || info.shape != spec.shape) {
      throw_format(where, "tensor " + quote_text(info.name) + " is " +
                              std::string(safetensors_name(info.dtype)) + " " +
                              shape_string(info.shape) + ", its description needs " +
                              std::string(safetensors_name(spec.dtype)) + " " +
                              shape_string(spec.shape));
    }
  }
  for (const StoredField& field : layer.fields) {
    const bool known = std::any_of(specs.begin(), specs.end(), [&](const TensorSpec& spec) {
      return spec.present && spec.name == field.name;
    });
    if (!known) {
      throw_format(
          where, "tensor " + quote_text(field.info->name) + " does not belong to its description");
    }
  }
}

using Files = std::vector<const SafetensorsFile*>;

Files files_of(const Checkpoint& checkpoint) {
  Files files;
  for (std::size_t i = 0; i < checkpoint.shard_count(); ++i) files.push_back(&checkpoint.shard(i));
  return files;
}

// What a description says, and which file says so.
struct Described {
  LayerDescription layer;
  const SafetensorsFile* file;
};

std::map<std::string, Described> read_descriptions(const Files& files) {
  std::map<std::string, Described> all;
  const std::string* previous = nullptr;
  for (const SafetensorsFile* file : files) {
    const auto text = file->metadata().find(kLayersMetadataKey);
    if (text == file->metadata().end()) continue;
    // Shards of save_pretrained repeat one long text.
    if (previous != nullptr && *previous == text->second) continue;
    previous = &text->second;
    for (auto& [name, layer] : parse_layers(*file, text->second)) {
      const auto [known, is_new] = all.emplace(name, Described{layer, file});
      if (!is_new && !(known->second.layer == layer)) {
        throw_format(where_of(*file),
                     "layer " + quote_text(name) + " is described otherwise than in " +
                         quote_text(known->second.file->path().filename().string()));
      }
    }
  }
  return all;
}

// The files of a checkpoint, a shard first: only save_pretrained puts tensors of a layer elsewhere.
Files nearest_first(Files files, std::size_t shard) {
  std::swap(files[0], files[shard]);
  return files;
}

// The layer whose W_q is in the first of `files`.
StoredLayer locate(const LayerDescription& description, std::size_t shard, const Files& files) {
  StoredLayer layer{description, shard, {}};
  for (const std::string field : kTensorNames) {
    const std::string name = description.name + "." + field;
    for (const SafetensorsFile* file : files) {
      const TensorInfo* info = file->find(name);
      if (info == nullptr) continue;
      layer.fields.push_back({field, info, file});
      break;
    }
  }
  check_fields(layer, where_of(*files[0]) + ", layer " + quote_text(description.name));
  return layer;
}

std::vector<StoredLayer> read_layers(const Files& files) {
  std::map<std::string, Described> descriptions = read_descriptions(files);
  std::vector<StoredLayer> layers;
  if (descriptions.empty()) return layers;
  for (std::size_t shard = 0; shard < files.size(); ++shard) {
    const Files nearest = nearest_first(files, shard);
    for (const TensorInfo& info : files[shard]->tensors()) {
      if (!info.name.ends_with(".W_q")) continue;
      const auto description = descriptions.find(info.name.substr(0, info.name.size() - 4));
      if (description == descriptions.end()) continue;
      layers.push_back(locate(description->second.layer, shard, nearest));
      descriptions.erase(description);
    }
  }
  if (!descriptions.empty()) {
    const auto& [name, described] = *descriptions.begin();
    throw_format(where_of(*described.file),
                 "tensor " + quote_text(name + ".W_q") + " is missing; the metadata describes it");
  }
  return layers;
}

}  // namespace

std::string describe_layers(const std::vector<LayerDescription>& layers) {
  Json descriptions = Json::object();
  Json transposed = Json::array();
  for (const LayerDescription& layer : layers) {
    if (layer.transposed) transposed.push_back(layer.name);
    Json json = layer_config_to_json(layer.config);
    json["tensor"] = layer.tensor;
    json["shape"] = layer.shape;
    json["dtype"] = std::string(dtype_name(layer.dtype));
    descriptions[layer.name] = json;
  }
  Json json{{"format_version", kFormatVersion}, {"layers", descriptions}};
  if (!transposed.empty()) json["transposed"] = transposed;
  return json.dump();
}

std::vector<StoredLayer> read_stored_layers(const SafetensorsFile& file) {
  return read_layers({&file});
}

std::vector<StoredLayer> read_stored_layers(const Checkpoint& checkpoint) {
  return read_layers(files_of(checkpoint));
}

QuantizedTensor read_matrix(const StoredLayer& layer, std::int64_t expert, bool map_codes,
                            BlockPool* pool) {
  const LayerDescription& description = layer.description;
  if (expert < 0 || expert >= description.matrices()) {
    throw_invalid("load_quantized", "layer " + quote_text(description.name) + " has " +
                                        std::to_string(description.matrices()) +
                                        " matrices, there is no expert " + std::to_string(expert));
  }
  QuantizedTensor q;
  q.config = description.config;
  q.out_features = description.out_features();
  q.in_features = description.in_features();
  for (const auto& [field, destination] : q.fields()) {
    const std::string& wanted = field;
    const auto found = std::find_if(layer.fields.begin(), layer.fields.end(),
                                    [&](const auto& stored) { return stored.name == wanted; });
    if (found == layer.fields.end()) continue;
    const TensorInfo& info = *found->info;
    const SafetensorsFile& file = *found->file;
    std::vector<std::int64_t> shape = info.shape;
    if (description.is_fused()) shape.erase(shape.begin());
    const std::uint64_t size = info.nbytes() / static_cast<std::uint64_t>(description.matrices());
    const std::uint64_t offset = size * static_cast<std::uint64_t>(expert);
    if (map_codes && field == "W_q") {
      Tensor mapped = file.map(info);
      *destination = {info.dtype, shape, {mapped.buffer.owner, mapped.buffer.data + offset, size}};
      continue;
    }
    const bool from_pool = pool != nullptr && field == "W_q";
    *destination =
        from_pool ? pool->allocate(info.dtype, shape) : Tensor::allocate(info.dtype, shape);
    file.read(info, offset, {destination->buffer.data, destination->buffer.size});
  }
  q.validate(description.name);
  return q;
}

// In squares that fit into the L1 cache.
void transpose_matrix(const Tensor& from, const Tensor& to) {
  constexpr std::int64_t kSquare = 32;
  const std::int64_t rows = from.shape[0], cols = from.shape[1];
  const std::size_t size = dtype_size(from.dtype);
  const auto at = [size](std::byte* data, std::int64_t index) {
    return data + static_cast<std::size_t>(index) * size;
  };
  for (std::int64_t r0 = 0; r0 < rows; r0 += kSquare) {
    for (std::int64_t c0 = 0; c0 < cols; c0 += kSquare) {
      for (std::int64_t r = r0; r < std::min(r0 + kSquare, rows); ++r) {
        for (std::int64_t c = c0; c < std::min(c0 + kSquare, cols); ++c) {
          std::memcpy(at(to.buffer.data, c * rows + r), at(from.buffer.data, r * cols + c), size);
        }
      }
    }
  }
}

bool is_quantized_by_us(const Checkpoint& checkpoint) {
  for (std::size_t i = 0; i < checkpoint.shard_count(); ++i) {
    if (checkpoint.shard(i).metadata().contains(kLayersMetadataKey)) return true;
  }
  if (checkpoint.config_json().empty()) return false;
  const Json config = parse_python_json(checkpoint.config_json(), "config.json");
  if (!config.is_object()) return false;
  const auto quantization = config.find("quantization_config");
  if (quantization == config.end() || !quantization->is_object()) return false;
  const auto names_us = [&](const char* key) {
    const auto found = quantization->find(key);
    return found != quantization->end() && found->is_string() &&
           found->get_ref<const std::string&>() == kQuantizerName;
  };
  return names_us(kQuantizerKey) || names_us("quant_method");
}

QuantizedTensor load_quantized(const Checkpoint& checkpoint, const std::string& layer_name,
                               std::int64_t expert) {
  const auto [info, shard] = checkpoint.find(layer_name + ".W_q");
  if (info != nullptr) {
    const Files files = nearest_first(files_of(checkpoint), shard);
    for (const SafetensorsFile* file : files) {
      const auto text = file->metadata().find(kLayersMetadataKey);
      if (text == file->metadata().end()) continue;
      const std::map<std::string, LayerDescription> layers = parse_layers(*file, text->second);
      const auto found = layers.find(layer_name);
      if (found != layers.end()) return read_matrix(locate(found->second, shard, files), expert);
    }
  }
  throw_invalid("load_quantized", "there is no quantized layer " + quote_text(layer_name) + " in " +
                                      checkpoint.path().string());
}

std::vector<std::string> quantized_layers(const Checkpoint& checkpoint) {
  std::vector<std::string> names;
  for (const StoredLayer& layer : read_stored_layers(checkpoint)) {
    names.push_back(layer.description.name);
  }
  return names;
}

}  // namespace hqq

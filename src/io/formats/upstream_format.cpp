// The layout of upstream hqq as a checkpoint format.
#include "hqq/error.hpp"
#include "src/io/formats/format.hpp"
#include "src/io/formats/upstream.hpp"
#include "src/io/formats/upstream_config.hpp"
#include "src/io/formats/upstream_pack.hpp"
#include "src/io/formats/upstream_parts.hpp"

namespace hqq {
namespace {

constexpr std::string_view kCodes = ".W_q";

// A tensor of the source and its file.
struct Located {
  const SafetensorsFile* file = nullptr;
  const TensorInfo* info = nullptr;

  Tensor read(std::uint64_t offset, std::uint64_t size) const {
    Tensor bytes = Tensor::allocate(DType::kU8, {static_cast<std::int64_t>(size)});
    file->read(*info, offset, {bytes.buffer.data, bytes.buffer.size});
    return bytes;
  }
};
using LocatedTensors = std::map<std::string, Located>;  // by key, without bias

// Bytes of the small tensors, types and shapes of the others.
std::map<std::string, Tensor> small_tensors(const LocatedTensors& tensors) {
  constexpr std::uint64_t kSmall = 512;
  std::map<std::string, Tensor> result;
  for (const auto& [key, located] : tensors) {
    const TensorInfo& info = *located.info;
    result[key] =
        info.nbytes() <= kSmall ? located.file->read(info) : Tensor{info.dtype, info.shape, {}};
  }
  return result;
}

LocatedTensors locate(const Checkpoint& source, const std::string& name) {
  std::vector<std::string> keys = upstream_keys();
  keys.push_back("zero_scale");
  LocatedTensors found;
  for (const std::string& key : keys) {
    const auto [info, shard] = source.find(name + "." + key);
    // The bias is a plain tensor in all formats.
    if (info != nullptr && key != "bias") found[key] = {&source.shard(shard), info};
  }
  return found;
}

LayerDescription describe(const std::string& name, const UpstreamLayer& layer) {
  LayerDescription description;
  description.name = name;
  description.tensor = name + ".weight";
  description.config = layer.config;
  description.dtype = layer.options.compute_dtype.value_or(layer.config.meta_dtype);
  description.shape = {layer.out_features, layer.in_features};
  return description;
}

class UpstreamReader : public FormatReader {
 public:
  UpstreamReader(const Checkpoint& source, const TensorSet& taken) {
    for (std::size_t shard = 0; shard < source.shard_count(); ++shard) {
      for (const TensorInfo& tensor : source.shard(shard).tensors()) {
        if (!tensor.name.ends_with(kCodes) || taken.contains(&tensor)) continue;
        add(source, shard, tensor.name.substr(0, tensor.name.size() - kCodes.size()));
      }
    }
  }

  TensorRecipe recipe(std::size_t layer, const TensorSpec& spec) const override {
    const std::string name = spec.name;
    return name == "W_q" ? codes(layer, spec) : metadata(layer, name, spec.nbytes());
  }

 private:
  void add(const Checkpoint& source, std::size_t shard, const std::string& name) {
    LocatedTensors tensors = locate(source, name);
    const UpstreamLayer parsed = parse_upstream(small_tensors(tensors), name);
    SourceLayer layer{describe(name, parsed), shard, {tensors.at("W_q").info}};
    for (const auto& [key, located] : tensors) {
      if (key != "W_q") layer.tensors.push_back(located.info);
    }
    layers_.push_back(std::move(layer));
    stacked_.push_back(parsed.zero_scale);
    tensors_.push_back(std::move(tensors));
  }

  TensorRecipe codes(std::size_t layer, const TensorSpec& spec) const {
    const Located words = tensors_[layer].at("W_q");
    const LayerDescription& description = layers_[layer].description;
    return {words.info->nbytes(),
            {[words] { return words.file->read(*words.info); }},
            [spec, width = description.config.nbits, cols = description.in_features(),
             where = upstream::where_of(description.name)](std::vector<Tensor> input) {
              Tensor rows = Tensor::allocate(spec.dtype, spec.shape);
              unpack_upstream(width, input[0], cols, rows, where);
              return rows;
            }};
  }

  TensorRecipe metadata(std::size_t layer, const std::string& name, std::uint64_t size) const {
    const bool stacked = stacked_[layer];
    const Located located = tensors_[layer].at(stacked ? "zero_scale" : name);
    const std::uint64_t offset = stacked && name == "scale" ? size : 0;
    return {size, {[=] { return located.read(offset, size); }}, [](std::vector<Tensor> input) {
              return std::move(input[0]);
            }};
  }

  std::vector<LocatedTensors> tensors_;  // of the layers
  std::vector<bool> stacked_;            // whether zero and scale are one tensor
};

class UpstreamWriter : public FormatWriter {
 public:
  std::vector<TargetTensor> tensors(const LayerDescription& layer) const override {
    if (layer.is_fused()) {
      throw_invalid(
          upstream::where_of(layer.name),
          "hqq has no experts that share a tensor (this one is " + shape_string(layer.shape) + ")");
    }
    std::vector<TargetTensor> all;
    for (const auto& [key, tensor] :
         upstream_layout(layer.config, layer.out_features(), layer.in_features(), layer.name)) {
      all.push_back(target(key, tensor, layer));
    }
    return all;
  }

  std::string shard_text(const std::vector<LayerDescription>&) const override { return ""; }

  std::string config_json(const ConvertedModel& model) const override {
    return upstream_config_json(model.config_json, model.layers);
  }

 private:
  static TargetTensor target(const std::string& key, const Tensor& form,
                             const LayerDescription& layer) {
    TargetTensor target{key, form.dtype, form.shape, {}, {}};
    if (key == "W_q") {
      target.parts = {"W_q"};
      target.compute = [form, width = layer.config.nbits,
                        cols = layer.in_features()](std::vector<Tensor> input) {
        Tensor words = Tensor::allocate(form.dtype, form.shape);
        pack_upstream(width, input[0], cols, words);
        return words;
      };
    } else if (key == "scale" || key == "zero") {
      target.parts = {key, key + "_step", key + "_offset"};
      target.compute = [form](std::vector<Tensor> input) {
        Tensor out = form;
        fill_upstream_metadata(input[0], input[1], input[2], out);
        return out;
      };
    } else {
      target.compute = [form](std::vector<Tensor>) { return form; };
    }
    return target;
  }
};

}  // namespace

std::unique_ptr<FormatReader> open_upstream(const Checkpoint& source, const TensorSet& taken) {
  return std::make_unique<UpstreamReader>(source, taken);
}

std::unique_ptr<FormatWriter> make_upstream_writer() { return std::make_unique<UpstreamWriter>(); }

}  // namespace hqq

// hqq-cpp inspect
#include <algorithm>
#include <set>

#include "src/cli/cli.hpp"
#include "src/cli/commands.hpp"
#include "src/cli/table.hpp"
#include "src/config/config_json.hpp"
#include "src/io/formats/format.hpp"

namespace hqq::cli {
namespace {

using Json = nlohmann::ordered_json;

struct InspectFlags {
  CommonOptions common;
  std::string path;
};

struct Layer {
  std::string name;
  std::string format;  // as to_string(CheckpointFormat) has it
  LayerConfig config;
  std::vector<std::int64_t> shape;
  std::uint64_t weights = 0, bytes = 0;
  std::size_t shard = 0;

  double bits() const {
    return 8.0 * static_cast<double>(bytes) /
           static_cast<double>(std::max<std::uint64_t>(weights, 1));
  }
};

struct Contents {
  std::vector<Layer> layers;
  std::vector<const TensorInfo*> others;  // tensors of no layer
  Layer total;                            // the sum of all layers
  std::uint64_t other_bytes = 0;
};

Contents contents_of(const Checkpoint& checkpoint) {
  Contents contents;
  TensorSet used;
  for (const Format& format : checkpoint_formats()) {
    const auto source = format.open(checkpoint, used);
    for (const SourceLayer& found : source->layers()) {
      Layer layer{found.description.name, format.name, found.description.config,
                  found.description.shape};
      layer.weights = static_cast<std::uint64_t>(found.description.numel());
      layer.bytes = found.nbytes();
      layer.shard = found.shard;
      used.insert(found.tensors.begin(), found.tensors.end());
      contents.layers.push_back(layer);
    }
  }
  for (const Layer& layer : contents.layers) {
    contents.total.weights += layer.weights;
    contents.total.bytes += layer.bytes;
  }
  for (std::size_t shard = 0; shard < checkpoint.shard_count(); ++shard) {
    for (const TensorInfo& info : checkpoint.shard(shard).tensors()) {
      if (used.count(&info) > 0) continue;
      contents.others.push_back(&info);
      contents.other_bytes += info.nbytes();
    }
  }
  return contents;
}

void print_contents(std::ostream& out, const Checkpoint& checkpoint, const Contents& contents) {
  if (!contents.layers.empty()) {
    Table table(
        {"quantized layer", "format", "nbits", "group", "axis", "shape", "bytes", "bits/weight"});
    for (const Layer& layer : contents.layers) {
      table.add_row({layer.name, layer.format, general_text(nbits_of(layer.config.nbits), 3),
                     layer.config.group_size ? std::to_string(*layer.config.group_size) : "none",
                     std::to_string(layer.config.axis), shape_string(layer.shape),
                     bytes_text(layer.bytes), fixed_text(layer.bits(), 2)});
    }
    table.print(out);
    out << '\n';
  }
  if (!contents.others.empty()) {
    Table table({"other tensor", "dtype", "shape", "bytes"});
    for (const TensorInfo* info : contents.others) {
      table.add_row({info->name, std::string(dtype_name(info->dtype)), shape_string(info->shape),
                     bytes_text(info->nbytes())});
    }
    table.print(out);
    out << '\n';
  }
  out << checkpoint.shard_count() << (checkpoint.shard_count() == 1 ? " file: " : " files: ")
      << contents.layers.size() << " quantized layers, "
      << count_text(static_cast<double>(contents.total.weights)) << " weights in "
      << bytes_text(contents.total.bytes);
  if (contents.total.weights > 0) {
    out << " (" << fixed_text(contents.total.bits(), 2) << " bits a weight)";
  }
  out << "; " << contents.others.size() << " other tensors, " << bytes_text(contents.other_bytes)
      << '\n';
}

Json contents_json(const InspectFlags& options, const Checkpoint& checkpoint,
                   const Contents& contents) {
  Json json;
  json["command"] = "inspect";
  json["path"] = options.path;
  json["files"] = checkpoint.shard_names();
  json["weights"] = contents.total.weights;
  json["bits_per_weight"] = contents.total.weights == 0 ? 0.0 : contents.total.bits();
  json["quantized_bytes"] = contents.total.bytes;
  json["other_bytes"] = contents.other_bytes;
  json["layers"] = Json::array();
  for (const Layer& layer : contents.layers) {
    Json one;
    one["name"] = layer.name;
    one["tag"] = layer_tag(layer.name);
    one["format"] = layer.format;
    one["shape"] = shape_json(layer.shape);
    one["config"] = layer_config_to_json(layer.config);
    one["bytes"] = layer.bytes;
    one["bits_per_weight"] = layer.bits();
    one["file"] = checkpoint.shard_names()[layer.shard];
    json["layers"].push_back(one);
  }
  json["tensors"] = Json::array();
  for (const TensorInfo* info : contents.others) {
    Json one;
    one["name"] = info->name;
    one["dtype"] = std::string(dtype_name(info->dtype));
    one["shape"] = shape_json(info->shape);
    one["bytes"] = info->nbytes();
    json["tensors"].push_back(one);
  }
  return json;
}

int run_inspect(const InspectFlags& options, Context& context) {
  const Checkpoint checkpoint(options.path);
  const Contents contents = contents_of(checkpoint);
  if (options.common.json) {
    print_json(context.out, contents_json(options, checkpoint, contents));
  } else if (!options.common.quiet) {
    print_contents(context.out, checkpoint, contents);
  }
  return kOk;
}

}  // namespace

void add_inspect(CLI::App& app, Context& context) {
  CLI::App* command = app.add_subcommand("inspect", "List the layers and tensors of a checkpoint");
  auto o = std::make_shared<InspectFlags>();
  command->add_option("PATH", o->path, "Checkpoint folder or .safetensors file")->required();
  add_output(*command, o->common);
  command->callback(
      [=, &context] { context.action = [=, &context] { return run_inspect(*o, context); }; });
}

}  // namespace hqq::cli

// hqq-cpp inspect
#include <set>

#include "hqq/version.hpp"
#include "src/cli/cli.hpp"
#include "src/cli/commands.hpp"
#include "src/cli/table.hpp"
#include "src/io/layer_store.hpp"

namespace hqq::cli {
namespace {

using Json = nlohmann::ordered_json;

struct Options {
  CommonOptions common;
  std::string path;
};

struct Contents {
  std::vector<StoredLayer> layers;
  std::vector<const TensorInfo*> others;  // tensors of no layer
  std::uint64_t weights = 0, layer_bytes = 0, other_bytes = 0;

  double bits_per_weight() const {
    return weights == 0 ? 0.0
                        : 8.0 * static_cast<double>(layer_bytes) / static_cast<double>(weights);
  }
};

std::uint64_t bytes_of(const StoredLayer& layer) {
  std::uint64_t bytes = 0;
  for (const auto& [field, info] : layer.fields) bytes += info->nbytes();
  return bytes;
}

double bits_of(const StoredLayer& layer) {
  return 8.0 * static_cast<double>(bytes_of(layer)) /
         static_cast<double>(std::max<std::int64_t>(layer.description.numel(), 1));
}

Contents contents_of(const Checkpoint& checkpoint) {
  Contents contents;
  contents.layers = read_stored_layers(checkpoint);
  std::set<const TensorInfo*> used;
  for (const StoredLayer& layer : contents.layers) {
    for (const auto& [field, info] : layer.fields) used.insert(info);
    contents.weights += static_cast<std::uint64_t>(layer.description.numel());
    contents.layer_bytes += bytes_of(layer);
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
        {"quantized layer", "nbits", "group", "axis", "solver", "shape", "bytes", "bits/weight"});
    for (const StoredLayer& layer : contents.layers) {
      const LayerConfig& config = layer.description.config;
      table.add_row({layer.description.name, general_text(nbits_of(config.nbits), 3),
                     config.group_size ? std::to_string(*config.group_size) : "none",
                     std::to_string(config.axis), to_string(config.solver),
                     shape_string(layer.description.shape), bytes_text(bytes_of(layer)),
                     fixed_text(bits_of(layer), 2)});
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
      << count_text(static_cast<double>(contents.weights)) << " weights in "
      << bytes_text(contents.layer_bytes);
  if (contents.weights > 0) {
    out << " (" << fixed_text(contents.bits_per_weight(), 2) << " bits a weight)";
  }
  out << "; " << contents.others.size() << " other tensors, " << bytes_text(contents.other_bytes)
      << '\n';
}

Json contents_json(const Options& options, const Checkpoint& checkpoint, const Contents& contents) {
  Json json;
  json["command"] = "inspect";
  json["path"] = options.path;
  json["files"] = checkpoint.shard_names();
  json["weights"] = contents.weights;
  json["bits_per_weight"] = contents.bits_per_weight();
  json["quantized_bytes"] = contents.layer_bytes;
  json["other_bytes"] = contents.other_bytes;
  json["layers"] = Json::array();
  for (const StoredLayer& layer : contents.layers) {
    Json one;
    one["name"] = layer.description.name;
    one["tag"] = layer_tag(layer.description.name);
    one["shape"] = shape_json(layer.description.shape);
    one["dtype"] = std::string(dtype_name(layer.description.dtype));
    one["config"] = layer_config_to_json(layer.description.config);
    one["bytes"] = bytes_of(layer);
    one["bits_per_weight"] = bits_of(layer);
    one["file"] = checkpoint.shard_names()[layer.shard];
    json["layers"].push_back(one);
  }
  json["tensors"] = Json::array();
  for (const TensorInfo* info : contents.others) {
    json["tensors"].push_back({{"name", info->name},
                               {"dtype", std::string(dtype_name(info->dtype))},
                               {"shape", shape_json(info->shape)},
                               {"bytes", info->nbytes()}});
  }
  return json;
}

int run_inspect(const Options& options, Context& context) {
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
  CLI::App* command = app.add_subcommand(
      "inspect", "List the layers and tensors of a checkpoint; reads headers only");
  auto o = std::make_shared<Options>();
  command->add_option("PATH", o->path, "Checkpoint folder or .safetensors file")->required();
  add_output(*command, o->common);
  command->callback(
      [=, &context] { context.action = [=, &context] { return run_inspect(*o, context); }; });
}

}  // namespace hqq::cli

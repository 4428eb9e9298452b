// hqq-cpp quantize
#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "hqq/error.hpp"
#include "hqq/version.hpp"
#include "src/base/quoted_text.hpp"
#include "src/cli/cli.hpp"
#include "src/cli/commands.hpp"
#include "src/cli/progress.hpp"
#include "src/cli/quantize_config.hpp"
#include "src/cli/table.hpp"
#include "src/config/config_json.hpp"

namespace hqq::cli {
namespace {

using Json = nlohmann::ordered_json;

struct QuantizeFlags {
  CommonOptions common;
  std::string source, destination;
  double nbits = 0;
  std::string group_size, solver, balance, meta_dtype;
  int axis = 0, iterations = 0;
  double lp_norm = 0;
  bool quant_zero = false, quant_scale = false;
  std::string config_file, dynamic_config_file, importance;
  std::vector<std::string> skip;
  std::string device = "cpu";
  bool dry_run = false, resume = false;
};

// Layers with one tag.
struct TagSummary {
  std::size_t layers = 0;
  std::set<std::string> nbits, group_sizes;
  std::uint64_t weights = 0, before = 0, after = 0;
  double relative = 0;  // sum over layers
  double squares = 0;   // sum over weights

  void add(const LayerReport& layer);
  std::vector<std::string> cells(const std::string& name, bool stats) const;
};

std::uint64_t numel(const LayerReport& layer) {
  std::uint64_t count = 1;
  for (const std::int64_t dimension : layer.shape) count *= static_cast<std::uint64_t>(dimension);
  return count;
}

std::string group_text(const LayerConfig& config) {
  return config.group_size ? std::to_string(*config.group_size) : "none";
}

std::string join(const std::set<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : "/") + part;
  return text;
}

void TagSummary::add(const LayerReport& layer) {
  ++layers;
  nbits.insert(general_text(nbits_of(layer.config.nbits), 3));
  group_sizes.insert(group_text(layer.config));
  weights += numel(layer);
  before += layer.bytes_before;
  after += layer.bytes_after;
  relative += layer.stats.relative_error;
  squares += layer.stats.rms_error * layer.stats.rms_error * static_cast<double>(numel(layer));
}

std::vector<std::string> TagSummary::cells(const std::string& name, bool stats) const {
  const auto count = static_cast<double>(weights);
  std::vector<std::string> row = {
      name,
      std::to_string(layers),
      join(nbits),
      join(group_sizes),
      count_text(count),
      bytes_text(before),
      bytes_text(after),
      weights == 0 ? "" : fixed_text(8.0 * static_cast<double>(after) / count, 2)};
  if (stats && layers > 0) {
    row.push_back(fixed_text(relative / static_cast<double>(layers), 4));
    row.push_back(general_text(std::sqrt(squares / std::max(count, 1.0)), 4));
  }
  return row;
}

void print_report(std::ostream& out, const QuantizeReport& report, bool stats) {
  std::vector<std::string> titles = {"layer type", "layers", "nbits", "group",
                                     "weights",    "before", "after", "bits/weight"};
  if (stats) titles.insert(titles.end(), {"rel. error", "rms error"});
  Table table(titles);
  std::vector<std::string> order;  // of first appearance
  std::map<std::string, TagSummary> tags;
  TagSummary total;
  for (const LayerReport& layer : report.layers) {
    if (tags.find(layer.tag) == tags.end()) order.push_back(layer.tag);
    tags[layer.tag].add(layer);
    total.add(layer);
  }
  for (const std::string& tag : order) table.add_row(tags[tag].cells(tag, stats));
  table.add_rule();
  table.add_row(total.cells("quantized", stats));
  table.print(out);
  if (!report.copied.empty()) {
    out << "left as they are: " << report.copied.size()
        << (report.copied.size() == 1 ? " matrix\n" : " matrices\n");
  }
  out << "all tensors: " << bytes_text(report.bytes_before) << " -> "
      << bytes_text(report.bytes_after);
  if (report.bytes_after > 0) {
    out << " ("
        << fixed_text(
               static_cast<double>(report.bytes_before) / static_cast<double>(report.bytes_after),
               2)
        << " times smaller)";
  }
  out << "\n";
}

Json report_json(const QuantizeFlags& options, const HqqConfig& config,
                 const QuantizeReport& report) {
  const bool stats = !options.dry_run;
  Json json;
  json["command"] = "quantize";
  json["version"] = kVersion;
  json["source"] = options.source;
  json["destination"] = options.destination;
  json["dry_run"] = options.dry_run;
  json["config"] = config_to_json(config);
  json["weights"] = report.weights;
  json["bits_per_weight"] = report.bits_per_weight;
  json["bytes_before"] = report.bytes_before;
  json["bytes_after"] = report.bytes_after;
  json["seconds"] = report.seconds;
  json["layers"] = Json::array();
  for (const LayerReport& layer : report.layers) {
    Json one;
    one["name"] = layer.name;
    one["tag"] = layer.tag;
    one["shape"] = shape_json(layer.shape);
    one["config"] = layer_config_to_json(layer.config);
    one["bytes_before"] = layer.bytes_before;
    one["bytes_after"] = layer.bytes_after;
    if (stats) {
      one["mean_abs_error"] = layer.stats.mean_abs_error;
      one["rms_error"] = layer.stats.rms_error;
      one["max_abs_error"] = layer.stats.max_abs_error;
      one["relative_error"] = layer.stats.relative_error;
    }
    json["layers"].push_back(one);
  }
  json["copied"] = report.copied;
  json["warnings"] = report.warnings;
  return json;
}

Json parse_group_size(const std::string& text) {
  if (text == "none" || text == "null") return nullptr;
  const bool digits =
      !text.empty() && text.size() < 18 &&
      text.find_first_not_of("0123456789", text[0] == '-' ? 1 : 0) == std::string::npos &&
      text != "-";
  if (!digits) {
    throw_invalid("quantize",
                  "--group-size must be a multiple of 8 or 'none', not " + quote_name(text));
  }
  return std::stoll(text);
}

HqqConfig make_config(const CLI::App& command, const QuantizeFlags& options) {
  ConfigSources sources;
  if (!options.config_file.empty()) {
    sources.config_text = read_text_file(options.config_file, "config");
  }
  if (!options.dynamic_config_file.empty()) {
    sources.dynamic_config_text = read_text_file(options.dynamic_config_file, "dynamic-config");
  }
  sources.skip = options.skip;
  Json& json = sources.overrides;
  const auto given = [&](const char* option) { return command.count(option) > 0; };
  if (given("--nbits")) {
    const bool whole = options.nbits == std::floor(options.nbits) && std::abs(options.nbits) < 1e6;
    json["nbits"] = whole ? Json(static_cast<int>(options.nbits)) : Json(options.nbits);
  }
  if (given("--group-size")) json["group_size"] = parse_group_size(options.group_size);
  if (given("--axis")) json["axis"] = options.axis;
  if (given("--solver")) json["solver"] = options.solver;
  if (given("--balance")) json["balance"] = options.balance;
  if (given("--lp-norm")) json["lp_norm"] = options.lp_norm;
  if (given("--iterations")) json["iterations"] = options.iterations;
  if (given("--quant-zero")) json["quant_zero"] = options.quant_zero;
  if (given("--quant-scale")) json["quant_scale"] = options.quant_scale;
  if (given("--meta-dtype")) json["meta_dtype"] = options.meta_dtype;
  return build_config(sources);
}

int run_quantize(const CLI::App& command, const QuantizeFlags& options, Context& context) {
  const HqqConfig config = make_config(command, options);
  QuantizeReport report;
  {
    ProgressPrinter progress(context.err, options.common.quiet);
    QuantizeCheckpointOptions how;
    how.threads = options.common.threads;
    how.device = Device::parse(options.device);
    how.dry_run = options.dry_run;
    how.force = options.common.force;
    how.follow_links = options.common.follow_links;
    how.resume = options.resume;
    how.stats = true;
    how.importance = options.importance;
    how.progress = progress.callback();
    if (!options.dry_run) {
      context.after_interrupt = "nothing stands under " + options.destination +
                                " yet; add --resume to the same command to go on";
    }
    report = quantize_checkpoint(options.source, options.destination, config, how);
  }
  if (!options.common.quiet) {
    for (const std::string& warning : report.warnings) {
      context.err << "hqq-cpp: warning: " << printable(warning) << "\n";
    }
  }
  if (options.common.json) {
    print_json(context.out, report_json(options, config, report));
  } else if (!options.common.quiet) {
    print_report(context.out, report, !options.dry_run);
    if (options.dry_run) {
      context.out << "dry run: nothing was written\n";
    } else {
      context.out << "wrote " << printable(options.destination) << " in "
                  << fixed_text(report.seconds, 1) << " s\n";
    }
  }
  return kOk;
}

}  // namespace

void add_quantize(CLI::App& app, Context& context) {
  CLI::App* command = app.add_subcommand("quantize", "Quantize a checkpoint folder");
  auto o = std::make_shared<QuantizeFlags>();
  command->add_option("SRC", o->source, "Folder with safetensors, or one .safetensors file")
      ->required();
  command->add_option("DST", o->destination, "Folder to write")->required();

  const std::string settings = "Settings (defaults of HqqConfig)";
  command->add_option("--nbits", o->nbits, "8, 6, 5, 4, 3, 2, 1.58 or 1 [4]")->group(settings);
  command->add_option("--group-size", o->group_size, "Multiple of 8, or 'none' for whole rows [64]")
      ->group(settings);
  command->add_option("--axis", o->axis, "1: groups inside rows, 0: inside columns [1]")
      ->group(settings);
  command->add_option("--solver", o->solver, "minmax, hqq or joint [joint]")->group(settings);
  command->add_option("--balance", o->balance, "auto, none or sinkhorn [auto]")->group(settings);
  command->add_option("--lp-norm", o->lp_norm, "Norm of the error [joint 2, hqq 0.7]")
      ->group(settings);
  command->add_option("--iterations", o->iterations, "Steps of the solver, 1 to 1000")
      ->group(settings);
  command->add_flag("--quant-zero,!--no-quant-zero", o->quant_zero, "Store zeros in 8 bits")
      ->group(settings);
  command->add_flag("--quant-scale,!--no-quant-scale", o->quant_scale, "Store scales in 8 bits")
      ->group(settings);
  command->add_option("--meta-dtype", o->meta_dtype, "float16, bfloat16 or float32 [float16]")
      ->group(settings);
  command
      ->add_option("--config", o->config_file,
                   "JSON file with settings, ours, Transformers' or upstream's; options win")
      ->group(settings);
  command
      ->add_option("--dynamic-config", o->dynamic_config_file,
                   "JSON file: name of layers or of a parent, glob or 're:...' -> settings or "
                   "null")
      ->group(settings);
  command
      ->add_option("--skip", o->skip,
                   "Layers to leave as they are: name, that of a parent, glob or 're:...'; "
                   "may be given several times")
      ->allow_extra_args(false)
      ->group(settings);
  command
      ->add_option("--importance", o->importance,
                   "Safetensors file: one weight per input column, by layer name")
      ->group(settings);

  add_threads(*command, o->common);
  command->add_option("--device", o->device, "cpu, cuda or cuda:<number> [cpu]");
  command->add_flag("--dry-run", o->dry_run, "Only say what would be done");
  CLI::Option* resume = command->add_flag("--resume", o->resume, "Go on after an interrupted run");
  add_force(*command, o->common);
  add_follow_links(*command, o->common);
  command->get_option("--force")->excludes(resume);
  add_output(*command, o->common);
  command->callback([=, &context] {
    context.action = [=, &context] { return run_quantize(*command, *o, context); };
  });
}

}  // namespace hqq::cli

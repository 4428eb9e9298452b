// hqq-cpp convert and hqq-cpp dequantize: one folder in, one folder out.
#include <chrono>

#include "hqq/error.hpp"
#include "src/base/json.hpp"
#include "src/cli/cli.hpp"
#include "src/cli/commands.hpp"
#include "src/cli/progress.hpp"
#include "src/cli/table.hpp"

namespace hqq::cli {
namespace {

struct ConvertFlags {
  CommonOptions common;
  std::string source, destination;
  std::string dtype = "auto";
  std::string to;
  bool no_qmodel = false;
};

// The dtype config.json names for the model, else float32.
DType model_dtype(const std::string& source) {
  const std::string text = Checkpoint(source).config_json();
  const auto json = parse_python_json(text.empty() ? "{}" : text, "config.json");
  for (const char* key : {"dtype", "torch_dtype"}) {
    if (!json.contains(key) || !json[key].is_string()) continue;
    const auto dtype = dtype_from_name(json[key].get<std::string>());
    if (dtype && is_weight_dtype(*dtype)) return *dtype;
  }
  return DType::kF32;
}

DType parse_dtype(const ConvertFlags& options) {
  if (options.dtype == "auto") return model_dtype(options.source);
  const auto dtype = dtype_from_name(options.dtype);
  if (!dtype || !is_weight_dtype(*dtype)) {
    throw_invalid("dequantize",
                  "--dtype must be auto, float32, bfloat16, float16 or float64, not " +
                      quote_name(options.dtype));
  }
  return *dtype;
}

std::uint64_t bytes_of(const std::string& path) { return Checkpoint(path).total_bytes(); }

// Runs `work`, then prints what was written. `details` goes into the JSON document.
int run_and_report(const std::string& name, const ConvertFlags& options, Context& context,
                   const nlohmann::ordered_json& details,
                   const std::function<void(const CheckpointOptions&)>& work) {
  const auto start = std::chrono::steady_clock::now();
  {
    ProgressPrinter progress(context.err, options.common.quiet);
    CheckpointOptions how;
    how.threads = options.common.threads;
    how.force = options.common.force;
    how.follow_links = options.common.follow_links;
    how.progress = progress.callback();
    work(how);
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const std::uint64_t before = bytes_of(options.source), after = bytes_of(options.destination);
  if (options.common.json) {
    nlohmann::ordered_json json;
    json["command"] = name;
    json["source"] = options.source;
    json["destination"] = options.destination;
    json.update(details);
    json["bytes_before"] = before;
    json["bytes_after"] = after;
    json["seconds"] = seconds;
    print_json(context.out, json);
  } else if (!options.common.quiet) {
    context.out << "wrote " << printable(options.destination) << " (" << bytes_text(before)
                << " -> " << bytes_text(after) << ") in " << fixed_text(seconds, 1) << " s\n";
  }
  return kOk;
}

int run_dequantize(const ConvertFlags& options, Context& context) {
  const DType dtype = parse_dtype(options);
  return run_and_report("dequantize", options, context, {{"dtype", std::string(dtype_name(dtype))}},
                        [&](const CheckpointOptions& how) {
                          dequantize_checkpoint(options.source, options.destination, dtype, how);
                        });
}

// Upstream's own loader reads qmodel.pt, a pickle, and no safetensors.
int add_qmodel(const ConvertFlags& options, Context& context) {
  Hooks::Outcome outcome{kOk, "the command hqq-cpp of the Python package writes it"};
  if (context.hooks.write_qmodel) outcome = context.hooks.write_qmodel(options.destination);
  if (outcome.code != kOk) {
    context.err << "hqq-cpp: " << outcome.message << '\n';
  } else if (!outcome.message.empty() && !options.common.quiet) {
    context.err << "note: qmodel.pt, which hqq's AutoHQQHFModel.from_quantized reads, was not "
                   "written: "
                << outcome.message << '\n';
  }
  return outcome.code;
}

int run_convert(const ConvertFlags& options, Context& context) {
  const CheckpointFormat to = checkpoint_format_from_string(options.to);
  const int code = run_and_report(
      "convert", options, context, {{"to", options.to}}, [&](const CheckpointOptions& how) {
        convert_checkpoint(options.source, options.destination, to, how);
      });
  if (to != CheckpointFormat::kUpstream || options.no_qmodel) return code;
  return add_qmodel(options, context);
}

CLI::App* add_command(CLI::App& app, const std::string& name, const std::string& description,
                      ConvertFlags& options) {
  CLI::App* command = app.add_subcommand(name, description);
  command->add_option("SRC", options.source, "Quantized checkpoint folder")->required();
  command->add_option("DST", options.destination, "Folder to write")->required();
  add_threads(*command, options.common);
  add_force(*command, options.common);
  add_follow_links(*command, options.common);
  add_output(*command, options.common);
  return command;
}

}  // namespace

void add_dequantize(CLI::App& app, Context& context) {
  auto o = std::make_shared<ConvertFlags>();
  CLI::App* command =
      add_command(app, "dequantize", "Write quantized layers as dense weights again", *o);
  command->add_option("--dtype", o->dtype,
                      "float32, bfloat16, float16, float64, or auto: what config.json says [auto]");
  command->callback(
      [=, &context] { context.action = [=, &context] { return run_dequantize(*o, context); }; });
}

void add_convert(CLI::App& app, Context& context) {
  auto o = std::make_shared<ConvertFlags>();
  CLI::App* command =
      add_command(app, "convert", "Change between our format and that of the hqq package", *o);
  command->add_option("--to", o->to, "upstream or hqq_cpp")->required();
  command->add_flag("--no-qmodel", o->no_qmodel,
                    "To upstream: leave out qmodel.pt, the second copy that hqq itself reads");
  command->callback(
      [=, &context] { context.action = [=, &context] { return run_convert(*o, context); }; });
}

}  // namespace hqq::cli

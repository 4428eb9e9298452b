// hqq-cpp verify
#include "src/cli/cli.hpp"
#include "src/cli/commands.hpp"
#include "src/cli/progress.hpp"
#include "src/cli/table.hpp"

namespace hqq::cli {
namespace {

struct VerifyFlags {
  CommonOptions common;
  std::string path;
};

int run_verify(const VerifyFlags& options, Context& context) {
  VerifyReport report;
  {
    ProgressPrinter progress(context.err, options.common.quiet);
    CheckpointOptions how;
    how.threads = options.common.threads;
    how.progress = progress.callback();
    context.after_interrupt = "not everything was checked";
    report = verify_checkpoint(options.path, how);
  }
  if (options.common.json) {
    nlohmann::ordered_json json;
    json["command"] = "verify";
    json["path"] = options.path;
    json["ok"] = report.problems.empty();
    json["problems"] = report.problems;
    json["files"] = report.files;
    json["layers"] = report.layers;
    json["bytes"] = report.bytes;
    print_json(context.out, json);
  } else if (!options.common.quiet) {
    for (const std::string& problem : report.problems) context.out << printable(problem) << '\n';
    context.out << (report.problems.empty()
                        ? "ok"
                        : std::to_string(report.problems.size()) +
                              (report.problems.size() == 1 ? " problem" : " problems"))
                << ": " << report.files << " files, " << report.layers << " quantized layers, "
                << bytes_text(report.bytes) << '\n';
  }
  return report.problems.empty() ? kOk : kDifferences;
}

}  // namespace

void add_verify(CLI::App& app, Context& context) {
  CLI::App* command = app.add_subcommand(
      "verify", "Recompute every hash and check every layer of a quantized checkpoint");
  auto o = std::make_shared<VerifyFlags>();
  command->add_option("PATH", o->path, "Folder that 'quantize' wrote")->required();
  add_threads(*command, o->common);
  add_output(*command, o->common);
  command->callback(
      [=, &context] { context.action = [=, &context] { return run_verify(*o, context); }; });
}

}  // namespace hqq::cli

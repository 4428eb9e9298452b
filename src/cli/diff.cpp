// hqq-cpp diff
#include "hqq/error.hpp"
#include "src/cli/cli.hpp"
#include "src/cli/commands.hpp"
#include "src/cli/progress.hpp"
#include "src/cli/table.hpp"

namespace hqq::cli {
namespace {

struct DiffFlags {
  CommonOptions common;
  std::string a, b;
  double tolerance = 0;
  bool all = false;
};

bool differs(const TensorDiff& diff, double tolerance) {
  if (diff.identical) return false;
  // Written so that NaN differs.
  return !diff.note.empty() || !(diff.relative <= tolerance) || tolerance == 0;
}

void print_diffs(std::ostream& out, const std::vector<TensorDiff>& diffs, const DiffFlags& options,
                 std::size_t different) {
  Table table({"tensor", "mean |A-B|", "rms", "max |A-B|", "relative", "note"});
  for (const TensorDiff& diff : diffs) {
    if (!differs(diff, options.tolerance) && !options.all) continue;
    if (!diff.note.empty()) {
      table.add_row({diff.name, "", "", "", "", diff.note});
    } else if (diff.identical) {
      table.add_row({diff.name, "0", "0", "0", "0", "identical"});
    } else {
      table.add_row({diff.name, general_text(diff.mean_abs, 4), general_text(diff.rms, 4),
                     general_text(diff.max_abs, 4), general_text(diff.relative, 4), ""});
    }
  }
  if (!table.empty()) table.print(out);
  out << different << " of " << diffs.size() << " tensors differ\n";
}

int run_diff(const DiffFlags& options, Context& context) {
  if (!(options.tolerance >= 0)) throw_invalid("diff", "--tolerance must be 0 or more");
  std::vector<TensorDiff> diffs;
  {
    ProgressPrinter progress(context.err, options.common.quiet);
    CheckpointOptions how;
    how.threads = options.common.threads;
    how.progress = progress.callback();
    context.after_interrupt = "not everything was compared";
    diffs = diff_checkpoints(options.a, options.b, how);
  }
  std::size_t different = 0;
  for (const TensorDiff& diff : diffs) different += differs(diff, options.tolerance) ? 1 : 0;
  if (options.common.json) {
    nlohmann::ordered_json json;
    json["command"] = "diff";
    json["a"] = options.a;
    json["b"] = options.b;
    json["tolerance"] = options.tolerance;
    json["different"] = different;
    json["tensors"] = nlohmann::ordered_json::array();
    for (const TensorDiff& diff : diffs) {
      json["tensors"].push_back({{"name", diff.name},
                                 {"identical", diff.identical},
                                 {"mean_abs", diff.mean_abs},
                                 {"rms", diff.rms},
                                 {"max_abs", diff.max_abs},
                                 {"relative", diff.relative},
                                 {"note", diff.note}});
    }
    print_json(context.out, json);
  } else if (!options.common.quiet) {
    print_diffs(context.out, diffs, options, different);
  }
  return different == 0 ? kOk : kDifferences;
}

}  // namespace

void add_diff(CLI::App& app, Context& context) {
  CLI::App* command = app.add_subcommand("diff", "Compare two checkpoints tensor by tensor");
  auto o = std::make_shared<DiffFlags>();
  command->add_option("A", o->a, "Checkpoint, quantized or not")->required();
  command->add_option("B", o->b, "Checkpoint, quantized or not")->required();
  command->add_option("--tolerance", o->tolerance,
                      "Tensors with ||A-B|| / ||A|| up to this count as equal [0]");
  command->add_flag("--all", o->all, "Also list tensors that do not differ");
  add_threads(*command, o->common);
  add_output(*command, o->common);
  command->callback(
      [=, &context] { context.action = [=, &context] { return run_diff(*o, context); }; });
}

}  // namespace hqq::cli

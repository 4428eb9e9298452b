// What the subcommands share. Each lives in a file of its own and adds itself to the application.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>

#include "hqq/checkpoint.hpp"
#include "src/cli/cli.hpp"

namespace hqq::cli {

struct Context {
  std::ostream& out;
  std::ostream& err;
  // The subcommand that was chosen; returns the exit code. Runs after all of argv has been parsed.
  std::function<int()> action;
  // Printed after "interrupted; ".
  std::string after_interrupt = "nothing was written";
  Hooks hooks;
};

void add_quantize(CLI::App& app, Context& context);
void add_inspect(CLI::App& app, Context& context);
void add_verify(CLI::App& app, Context& context);
void add_dequantize(CLI::App& app, Context& context);
void add_convert(CLI::App& app, Context& context);
void add_diff(CLI::App& app, Context& context);
void add_doctor(CLI::App& app, Context& context);

// Options that most subcommands have.
struct CommonOptions {
  int threads = 0;
  bool json = false;
  bool quiet = false;
  bool force = false;
  bool follow_links = false;
};

void add_threads(CLI::App& command, CommonOptions& options);
void add_output(CLI::App& command, CommonOptions& options);  // --json, --quiet
void add_force(CLI::App& command, CommonOptions& options);
void add_follow_links(CLI::App& command, CommonOptions& options);

// One JSON document and a newline.
void print_json(std::ostream& out, const nlohmann::ordered_json& json);
// The whole file; throws std::system_error when it cannot be read and std::invalid_argument when it
// has more than 16 MB.
std::string read_text_file(const std::string& path, const std::string& what);
// "[1024, 64]"
nlohmann::ordered_json shape_json(const std::vector<std::int64_t>& shape);

}  // namespace hqq::cli

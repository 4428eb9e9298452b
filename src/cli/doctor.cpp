// hqq-cpp doctor
#include "hqq/device.hpp"
#include "hqq/version.hpp"
#include "src/backend.hpp"
#include "src/cli/cli.hpp"
#include "src/cli/commands.hpp"
#include "src/cli/table.hpp"
#include "src/cpu/dispatch.hpp"

namespace hqq::cli {
namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

std::string join(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : " ") + part;
  return text;
}

int run_doctor(const CommonOptions& options, Context& context) {
  const std::vector<std::string> targets = cpu::supported_targets();
  const std::string target = cpu::current_target();
  const bool cuda = cuda::is_available();
  if (options.json) {
    nlohmann::ordered_json json;
    json["command"] = "doctor";
    json["version"] = kVersion;
    json["format_version"] = kFormatVersion;
    json["compiler"] = compiler();
    json["cpu_targets"] = targets;
    json["cpu_target"] = target;
    json["threads"] = default_threads();
    json["cuda"] = cuda;
    print_json(context.out, json);
  } else if (!options.quiet) {
    context.out << "hqq-cpp      " << kVersion << "\n"
                << "file format  " << kFormatVersion << "\n"
                << "compiler     " << compiler() << "\n"
                << "CPU targets  " << join(targets) << "\n"
                << "CPU in use   " << target << "\n"
                << "threads      " << default_threads() << "\n"
                << "CUDA         " << (cuda ? "found" : "not available") << "\n";
  }
  return kOk;
}

}  // namespace

void add_doctor(CLI::App& app, Context& context) {
  CLI::App* command = app.add_subcommand("doctor", "Say what this build and this machine offer");
  auto o = std::make_shared<CommonOptions>();
  add_output(*command, *o);
  command->callback(
      [=, &context] { context.action = [=, &context] { return run_doctor(*o, context); }; });
}

}  // namespace hqq::cli

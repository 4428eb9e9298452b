// hqq-cpp doctor
#include "hqq/device.hpp"
#include "hqq/version.hpp"
#include "src/backend.hpp"
#include "src/cli/cli.hpp"
#include "src/cli/commands.hpp"
#include "src/cli/table.hpp"
#include "src/cpu/dispatch.hpp"
#include "src/cuda/library.hpp"

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

std::string cuda_version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string compute_capability(const cuda::DeviceInfo& info) {
  return std::to_string(info.compute_major) + "." + std::to_string(info.compute_minor);
}

nlohmann::ordered_json text_or_null(const std::string& text) {
  if (text.empty()) return nullptr;
  return text;
}

nlohmann::ordered_json cuda_json(const cuda::Description& cuda) {
  nlohmann::ordered_json json;
  json["library"] = text_or_null(cuda.library);
  json["problem"] = text_or_null(cuda.problem);
  json["driver_version"] = cuda.driver.driver_version;
  json["runtime_version"] = cuda.driver.runtime_version;
  json["devices"] = nlohmann::ordered_json::array();
  for (const cuda::DeviceDescription& device : cuda.devices) {
    nlohmann::ordered_json one;
    one["device"] = "cuda:" + std::to_string(device.index);
    one["name"] = device.info.name;
    one["compute"] = compute_capability(device.info);
    one["multiprocessors"] = device.info.multiprocessors;
    one["total_memory"] = device.info.total_memory;
    one["problem"] = text_or_null(device.problem);
    json["devices"].push_back(one);
  }
  return json;
}

void print_cuda(std::ostream& out, const cuda::Description& cuda) {
  out << "CUDA         " << (cuda.problem.empty() ? "found" : "not available") << "\n";
  if (!cuda.library.empty()) out << "  library    " << printable(cuda.library) << "\n";
  if (cuda.driver.runtime_version > 0) {
    out << "  runtime    " << cuda_version(cuda.driver.runtime_version) << "\n"
        << "  driver     "
        << (cuda.driver.driver_version > 0 ? cuda_version(cuda.driver.driver_version) : "none")
        << "\n";
  }
  if (!cuda.problem.empty()) out << "  why        " << printable(cuda.problem) << "\n";
  for (const cuda::DeviceDescription& device : cuda.devices) {
    out << "  cuda:" << device.index << "     " << printable(device.info.name) << ", compute "
        << compute_capability(device.info) << ", " << device.info.multiprocessors
        << " multiprocessors, " << bytes_text(device.info.total_memory) << "\n";
    if (!device.problem.empty()) out << "             " << printable(device.problem) << "\n";
  }
}

int run_doctor(const CommonOptions& options, Context& context) {
  const std::vector<std::string> targets = cpu::supported_targets();
  const std::string target = cpu::current_target();
  const cuda::Description cuda = cuda::describe();
  if (options.json) {
    nlohmann::ordered_json json;
    json["command"] = "doctor";
    json["version"] = kVersion;
    json["format_version"] = kFormatVersion;
    json["compiler"] = compiler();
    json["cpu_targets"] = targets;
    json["cpu_target"] = target;
    json["threads"] = default_threads();
    json["cuda"] = cuda::is_available();
    json["cuda_details"] = cuda_json(cuda);
    print_json(context.out, json);
  } else if (!options.quiet) {
    context.out << "hqq-cpp      " << kVersion << "\n"
                << "file format  " << kFormatVersion << "\n"
                << "compiler     " << compiler() << "\n"
                << "CPU targets  " << join(targets) << "\n"
                << "CPU in use   " << target << "\n"
                << "threads      " << default_threads() << "\n";
    print_cuda(context.out, cuda);
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

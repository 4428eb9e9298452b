#include "src/cli/cli.hpp"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <memory>
#include <new>
#include <system_error>
#include <vector>

#include "hqq/error.hpp"
#include "hqq/version.hpp"
#include "src/base/json.hpp"
#include "src/cli/commands.hpp"
#include "src/cli/interrupt.hpp"
#include "src/cli/table.hpp"
#include "src/config/layer_match.hpp"

namespace hqq::cli {
namespace {

constexpr const char* kFooter =
    "Exit codes: 0 success; 1 verify or diff found differences; 2 wrong option, value or config;\n"
    "3 a file that breaks its format; 4 operating system or CUDA error; 5 internal error;\n"
    "130 interrupted.";

bool starts_with_dash(const std::string& text) { return !text.empty() && text[0] == '-'; }

std::vector<std::string> command_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands({})) names.push_back(command->get_name());
  return names;
}

// The long options of the chosen subcommand.
std::vector<std::string> option_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands()) {
    for (const CLI::Option* option : command->get_options()) {
      for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
    }
  }
  return names;
}

std::string usage_hint(const CLI::App& app) {
  const auto chosen = app.get_subcommands();
  return "Run 'hqq-cpp " + (chosen.empty() ? "" : chosen[0]->get_name() + " ") +
         "--help' for the options.";
}

int report(std::ostream& err, int code, const std::string& message) {
  err << "hqq-cpp: " << printable(message) << std::endl;
  return code;
}

int report_usage(const CLI::App& app, std::ostream& err, const CLI::ParseError& error) {
  std::string message = error.what();
  if (dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr) {
    const auto extras = app.remaining(true);
    const auto option = std::find_if(extras.begin(), extras.end(), starts_with_dash);
    if (option != extras.end()) {
      message = unknown_name_message("option", *option, option_names(app));
    }
  }
  // CLI11 separates several messages with newlines.
  std::replace(message.begin(), message.end(), '\n', ' ');
  report(err, kUserError, message);
  err << usage_hint(app) << std::endl;
  return kUserError;
}

int parse_and_run(CLI::App& app, Context& context, int argc, const char* const* argv) {
  if (argc < 2) {
    context.err << app.help();
    return kUserError;
  }
  const std::vector<std::string> commands = command_names(app);
  const std::string first = argv[1];
  if (!starts_with_dash(first) &&
      std::find(commands.begin(), commands.end(), first) == commands.end()) {
    report(context.err, kUserError, unknown_name_message("command", first, commands));
    context.err << usage_hint(app) << std::endl;
    return kUserError;
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() != 0) return report_usage(app, context.err, error);
    app.exit(error, context.out, context.err);  // --help and --version
    return kOk;
  }
  return context.action();
}

// A daemon may have closed 0, 1 and 2. The next file would get such a number, and progress would be
// written into it.
void open_standard_streams() {
  for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; ++fd) {
    if (::fcntl(fd, F_GETFD) >= 0 || errno != EBADF) continue;
    // The lowest free number, which is this one.
    if (::open("/dev/null", O_RDWR) != fd) return;
  }
}

// Whether nobody reads what is written there: `hqq-cpp inspect ... | head` is over, not wrong.
bool is_closed_pipe(int fd) {
  pollfd status{fd, POLLOUT, 0};
  return ::poll(&status, 1, 0) > 0 && (status.revents & POLLERR) != 0;
}

}  // namespace

int run(int argc, const char* const* argv, std::ostream& out, std::ostream& err,
        const Hooks& hooks) {
  open_standard_streams();
  const InterruptGuard guard;
  Context context{.out = out, .err = err, .action = {}, .hooks = hooks};
  try {
    CLI::App app("Quantize neural network checkpoints to 8..1 bits by half-quadratic quantization.",
                 "hqq-cpp");
    app.set_version_flag("--version", std::string("hqq-cpp ") + kVersion);
    app.require_subcommand(1);
    app.footer(kFooter);
    add_quantize(app, context);
    add_inspect(app, context);
    add_verify(app, context);
    add_dequantize(app, context);
    add_convert(app, context);
    add_diff(app, context);
    add_doctor(app, context);
    const int code = parse_and_run(app, context, argc, argv);
    out.flush();
    if (!out && !is_closed_pipe(STDOUT_FILENO)) {
      return report(err, kSystemError, "cannot write to standard output");
    }
    return code;
  } catch (const Interrupted&) {
    return report(err, kInterrupted, "interrupted; " + context.after_interrupt);
  } catch (const FormatError& error) {
    return report(err, kFormatError, error.what());
  } catch (const std::invalid_argument& error) {
    return report(err, kUserError, error.what());
  } catch (const std::system_error& error) {
    return report(err, kSystemError, error.what());
  } catch (const CudaError& error) {
    return report(err, kSystemError, error.what());
  } catch (const std::bad_alloc&) {
    return report(err, kSystemError, "out of memory");
  } catch (const std::exception& error) {
    return report(err, kInternalError, std::string("internal error: ") + error.what());
  }
}

void add_threads(CLI::App& command, CommonOptions& options) {
  command
      .add_option("--threads", options.threads,
                  "CPU threads; 0: HQQ_NUM_THREADS, else all processors")
      ->check(CLI::Range(0, 4096));
}

void add_output(CLI::App& command, CommonOptions& options) {
  command.add_flag("--json", options.json, "Print one JSON document instead of text");
  command.add_flag("--quiet,-q", options.quiet, "Print errors only (and the JSON document)");
}

void add_force(CLI::App& command, CommonOptions& options) {
  command.add_flag("--force", options.force, "Replace DST if it exists");
}

void add_follow_links(CLI::App& command, CommonOptions& options) {
  command.add_flag("--follow-links", options.follow_links,
                   "Use files that SRC links to from elsewhere, instead of refusing them");
}

void print_json(std::ostream& out, const nlohmann::ordered_json& json) {
  out << json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) << '\n';
}

std::string read_text_file(const std::string& path, const std::string& what) {
  const auto fail = [&] {
    throw std::system_error(errno, std::generic_category(),
                            "[" + what + "] cannot read " + quote_text(path));
  };
  // Without waiting: a shell's <(command) is a pipe, and whoever waits for one must hear Ctrl-C.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) fail();
  const std::shared_ptr<void> closer(nullptr, [fd](void*) { ::close(fd); });
  std::string text;
  char buffer[1 << 16];
  while (text.size() <= kMaxConfigBytes) {
    if (interrupted()) throw Interrupted("[" + what + "] interrupted");
    pollfd ready{fd, POLLIN, 0};
    if (::poll(&ready, 1, 100) <= 0) continue;
    const ssize_t count = ::read(fd, buffer, sizeof(buffer));
    if (count < 0 && errno != EINTR && errno != EAGAIN) fail();
    if (count == 0) return text;
    if (count > 0) text.append(buffer, static_cast<std::size_t>(count));
  }
  throw_invalid(what, quote_text(path) + " has more than the " + std::to_string(kMaxConfigBytes) +
                          " bytes allowed");
}

nlohmann::ordered_json shape_json(const std::vector<std::int64_t>& shape) {
  nlohmann::ordered_json json = nlohmann::ordered_json::array();
  for (const std::int64_t dimension : shape) json.push_back(dimension);
  return json;
}

}  // namespace hqq::cli

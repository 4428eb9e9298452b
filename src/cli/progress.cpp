#include "src/cli/progress.hpp"

#include <algorithm>
#include <iostream>

#include "src/cli/interrupt.hpp"
#include "src/cli/table.hpp"

#ifndef _WIN32
#include <sys/ioctl.h>
#include <unistd.h>
#endif

namespace hqq::cli {
namespace {

constexpr double kSecondsBetweenLines = 5;

bool is_terminal(const std::ostream& stream) {
#ifdef _WIN32
  (void)stream;
  return false;
#else
  return stream.rdbuf() == std::cerr.rdbuf() && isatty(STDERR_FILENO) != 0;
#endif
}

std::size_t terminal_width() {
#ifndef _WIN32
  winsize size{};
  if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
#endif
  return 80;
}

// Hashing files counts bytes, everything else weights.
std::string amount(const std::string& stage, double value) {
  const bool bytes = stage == "verify" || stage == "resume";
  return bytes ? bytes_text(static_cast<std::uint64_t>(value)) : count_text(value) + " weights";
}

std::string bar(double fraction) {
  constexpr int kCells = 24;
  const int filled = static_cast<int>(fraction * kCells);
  std::string text = "[";
  text.append(filled, '#');
  text.append(kCells - filled, '.');
  return text + "]";
}

}  // namespace

ProgressPrinter::ProgressPrinter(std::ostream& err, bool quiet)
    : err_(err), quiet_(quiet), terminal_(is_terminal(err)) {}

ProgressPrinter::~ProgressPrinter() { clear_bar(); }

ProgressCallback ProgressPrinter::callback() {
  return [this](const Progress& progress) {
    if (!quiet_) show(progress);
    return !interrupted();
  };
}

void ProgressPrinter::clear_bar() {
  if (bar_drawn_) err_ << "\r\x1b[K" << std::flush;
  bar_drawn_ = false;
}

void ProgressPrinter::show(const Progress& progress) {
  const auto done = static_cast<double>(progress.done);
  const auto total = static_cast<double>(progress.total);
  if (progress.stage != stage_) {
    stage_ = progress.stage;
    start_done_ = done;
    start_seconds_ = progress.seconds;
    last_line_ = progress.seconds;
  }
  const double fraction = total > 0 ? std::clamp(done / total, 0.0, 1.0) : 0.0;
  const double seconds = progress.seconds - start_seconds_;
  const double rate = seconds > 0 ? (done - start_done_) / seconds : 0;

  std::string line = printable(stage_) + " ";
  if (terminal_) line += bar(fraction) + " ";
  line += fixed_text(100 * fraction, 0) + "%";
  if (rate > 0) {
    line += "  " + amount(stage_, rate) + "/s";
    if (total > done) line += "  ETA " + duration_text((total - done) / rate);
  }
  line += "  " + printable(progress.current);

  if (terminal_) {
    // One column less than the terminal: some wrap when the last one is written.
    err_ << "\r\x1b[K" << line.substr(0, terminal_width() - 1) << std::flush;
    bar_drawn_ = true;
  } else if (progress.seconds - last_line_ >= kSecondsBetweenLines) {
    err_ << line << std::endl;
    last_line_ = progress.seconds;
  }
}

}  // namespace hqq::cli

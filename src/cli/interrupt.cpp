#include "src/cli/interrupt.hpp"

#include <csignal>

namespace hqq::cli {
namespace {

volatile std::sig_atomic_t signal_seen = 0;

extern "C" void hqq_cli_on_signal(int number) {
  signal_seen = 1;
  std::signal(number, SIG_DFL);
}

using Handler = void (*)(int);

Handler install(int number) {
  const Handler previous = std::signal(number, hqq_cli_on_signal);
  if (previous == SIG_IGN) std::signal(number, SIG_IGN);
  return previous;
}

void restore(int number, Handler previous) {
  if (previous != SIG_ERR) std::signal(number, previous);
}

}  // namespace

InterruptGuard::InterruptGuard() {
  signal_seen = 0;
  previous_int_ = install(SIGINT);
  previous_term_ = install(SIGTERM);
}

InterruptGuard::~InterruptGuard() {
  restore(SIGINT, previous_int_);
  restore(SIGTERM, previous_term_);
}

bool interrupted() { return signal_seen != 0; }

}  // namespace hqq::cli

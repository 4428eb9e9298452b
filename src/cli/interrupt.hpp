// Ctrl-C as a flag.
#pragma once

namespace hqq::cli {

// While one exists, the first SIGINT or SIGTERM only sets a flag; the second one ends the process.
// A signal that was ignored stays ignored (nohup, background jobs of a script).
class InterruptGuard {
 public:
  InterruptGuard();
  ~InterruptGuard();
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;

 private:
  using Handler = void (*)(int);
  Handler previous_int_;
  Handler previous_term_;
};

bool interrupted();

}  // namespace hqq::cli

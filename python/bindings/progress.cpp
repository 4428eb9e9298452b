#include "python/bindings/progress.hpp"

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "src/cpu/parallel.hpp"

namespace hqq::python {
namespace {

// Hands each Progress from the worker to the calling thread and waits for its answer.
class Mailbox {
 public:
  // Worker's side.
  bool ask(const Progress& progress) {
    std::unique_lock lock(mutex_);
    if (stop_) return false;
    question_ = &progress;
    changed_.notify_all();
    changed_.wait(lock, [&] { return question_ == nullptr; });
    return !stop_;
  }
  void finish() {
    const std::lock_guard lock(mutex_);
    finished_ = true;
    changed_.notify_all();
  }

  // Caller's side: waits for a question, the end or the time to look for signals.
  const Progress* wait(bool& finished) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, std::chrono::milliseconds(100),
                      [&] { return question_ != nullptr || finished_; });
    finished = finished_;
    return question_;
  }
  void answer(bool go_on) {
    const std::lock_guard lock(mutex_);
    stop_ = stop_ || !go_on;
    question_ = nullptr;
    changed_.notify_all();
  }
  void stop() {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  const Progress* question_ = nullptr;
  bool stop_ = false;
  bool finished_ = false;
};

// None counts as True: most callbacks return nothing.
bool call(const py::object& callback, const Progress& progress) {
  const py::object answer = callback(progress);
  return answer.is_none() || py::bool_(answer);
}

}  // namespace

void run_with_progress(const py::object& progress,
                       const std::function<void(const ProgressCallback&)>& work) {
  if (!progress.is_none() && PyCallable_Check(progress.ptr()) == 0) {
    throw py::type_error("[progress] progress must be callable or None, not " +
                         type_name(progress));
  }
  Mailbox mailbox;
  std::exception_ptr failure;
  std::exception_ptr raised;
  {
    const py::gil_scoped_release release;
    std::thread worker = cpu::start_thread([&] {
      try {
        work([&](const Progress& now) { return mailbox.ask(now); });
      } catch (...) {
        failure = std::current_exception();
      }
      mailbox.finish();
    });
    for (bool finished = false; !finished;) {
      const Progress* question = mailbox.wait(finished);
      const py::gil_scoped_acquire gil;
      bool go_on = !raised;
      try {
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        if (question != nullptr && go_on && !progress.is_none()) go_on = call(progress, *question);
      } catch (...) {
        if (!raised) raised = std::current_exception();
        go_on = false;
        mailbox.stop();
      }
      if (question != nullptr) mailbox.answer(go_on);
    }
    worker.join();
  }
  // The work may have come to its end all the same; what the user's code raised still counts.
  if (raised) std::rethrow_exception(raised);
  if (failure) std::rethrow_exception(failure);
}

}  // namespace hqq::python

#include "src/io/checkpoint/pipeline.hpp"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "hqq/error.hpp"
#include "src/cpu/parallel.hpp"

namespace hqq {
namespace {

// Enough for many small steps to be on their way at once.
constexpr std::uint64_t kMinBudget = std::uint64_t{32} << 20;
// Copies are read faster than they are written; more of them ahead would only take memory.
constexpr std::uint64_t kCopyBudget = 4 * kCopyChunk;
constexpr auto kProgressInterval = std::chrono::milliseconds(100);

struct Parcel {
  std::size_t step = 0;
  std::vector<Tensor> tensors;
  std::uint64_t bytes = 0;
};

// Thrown in threads that another thread's error has stopped; never leaves run_pipeline.
struct Stopped {};

class Pipeline {
 public:
  Pipeline(PipelineJob& job, const std::string& stage, const ProgressCallback& progress)
      : job_(job),
        count_(job.step_count()),
        threads_(job.compute_threads()),
        meter_(stage, total_work(job), progress) {
    std::uint64_t largest = 0, largest_sum = 0;
    for (std::size_t i = 0; i < count_; ++i) {
      const std::uint64_t input = job.input_bytes(i), output = job.output_bytes(i);
      largest = std::max({largest, input, output});
      largest_sum = std::max(largest_sum, input + output);
    }
    // One more of the largest steps than are computed must fit, or nothing would overlap.
    const auto more = static_cast<std::uint64_t>(threads_ - 1) * largest_sum;
    budget_ = std::max({kMinBudget, 3 * largest + more, 2 * largest_sum + more});
  }

  void run() {
    std::thread reader = cpu::start_thread([this] { guarded([this] { read_all(); }); });
    // If this throws (no more threads), the reader has to be stopped before it is destroyed.
    std::vector<std::thread> others;
    guarded([&] {
      others.reserve(
          static_cast<std::size_t>(threads_));  // a thread without a place ends the process
      others.push_back(cpu::start_thread([this] { guarded([this] { write_all(); }); }));
      for (int i = 1; i < threads_; ++i) {
        others.push_back(cpu::start_thread([this] { guarded([this] { compute_ahead(); }); }));
      }
    });
    guarded([this] { compute_all(); });
    reader.join();
    for (std::thread& thread : others) thread.join();
    if (error_) std::rethrow_exception(error_);
    meter_.advance(std::exchange(work_done_, 0));
    meter_.finish();
  }

 private:
  static std::uint64_t total_work(const PipelineJob& job) {
    std::uint64_t total = 0;
    for (std::size_t i = 0; i < job.step_count(); ++i) total += job.step_work(i);
    return total;
  }

  template <class Function>
  void guarded(Function function) {
    try {
      function();
    } catch (const Stopped&) {
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
      changed_.notify_all();
    }
  }

  // Waits until `ready`; throws Stopped when another thread has failed.
  template <class Condition>
  void wait(std::unique_lock<std::mutex>& lock, Condition ready) {
    changed_.wait(lock, [&] { return error_ || ready(); });
    if (error_) throw Stopped();
  }

  void read_all() {
    for (std::size_t step = 0; step < count_; ++step) {
      // Room for the result is taken here too: compute_all must not wait for it.
      const std::uint64_t bytes = job_.input_bytes(step) + job_.output_bytes(step);
      {
        std::unique_lock lock(mutex_);
        const bool copy = job_.output_bytes(step) == 0;
        wait(lock, [&] {
          if (copy && copies_ > 0 && copies_ + bytes > kCopyBudget) return false;
          return in_flight_ == 0 || in_flight_ + bytes <= budget_;
        });
        in_flight_ += bytes;
        if (copy) copies_ += bytes;
      }
      Parcel parcel{step, job_.read(step), bytes};
      const std::lock_guard lock(mutex_);
      to_compute_.push_back(std::move(parcel));
      changed_.notify_all();
    }
  }

  // On the calling thread, which alone reports.
  void compute_all() {
    while (auto parcel = take_waiting()) compute(std::move(*parcel));
    std::unique_lock lock(mutex_);
    while (!written_) {
      changed_.wait_for(lock, kProgressInterval, [&] { return error_ || written_; });
      if (error_) throw Stopped();
      report(lock, count_ - 1);
    }
  }

  void compute_ahead() {
    while (true) {
      std::unique_lock lock(mutex_);
      wait(lock, [&] { return taken_ == count_ || !to_compute_.empty(); });
      if (taken_ == count_) return;
      Parcel parcel = take(lock);
      compute(std::move(parcel));
    }
  }

  void compute(Parcel parcel) {
    const std::size_t step = parcel.step;
    parcel.tensors = job_.compute(step, std::move(parcel.tensors));
    const std::lock_guard lock(mutex_);
    work_done_ += job_.step_work(step);
    if (job_.output_bytes(step) > 0) {
      in_flight_ -= job_.input_bytes(step);
      parcel.bytes = job_.output_bytes(step);
    }
    to_write_.emplace(step, std::move(parcel));
    changed_.notify_all();
  }

  // The next step, or nothing after the last one.
  std::optional<Parcel> take_waiting() {
    std::unique_lock lock(mutex_);
    report(lock, taken_);
    while (to_compute_.empty() && taken_ < count_) {
      changed_.wait_for(lock, kProgressInterval,
                        [&] { return error_ || !to_compute_.empty() || taken_ == count_; });
      if (error_) throw Stopped();
      report(lock, taken_);
    }
    if (error_) throw Stopped();
    if (to_compute_.empty()) return std::nullopt;
    return take(lock);
  }

  // Unlocks.
  Parcel take(std::unique_lock<std::mutex>& lock) {
    Parcel parcel = std::move(to_compute_.front());
    to_compute_.pop_front();
    // Whoever waits for a step must know that there is none left.
    if (++taken_ == count_) changed_.notify_all();
    lock.unlock();
    return parcel;
  }

  // The callback runs unlocked: it may take its time.
  void report(std::unique_lock<std::mutex>& lock, std::size_t step) {
    meter_.advance(std::exchange(work_done_, 0));
    lock.unlock();
    if (step < count_) meter_.report(job_.step_name(step));
    lock.lock();
  }

  void write_all() {
    for (std::size_t step = 0; step < count_; ++step) {
      Parcel parcel;
      {
        std::unique_lock lock(mutex_);
        wait(lock, [&] { return to_write_.count(step) > 0; });
        parcel = std::move(to_write_.extract(step).mapped());
      }
      job_.write(step, std::move(parcel.tensors));
      const std::lock_guard lock(mutex_);
      in_flight_ -= parcel.bytes;
      if (job_.output_bytes(step) == 0) copies_ -= parcel.bytes;
      changed_.notify_all();
    }
    job_.finish();
    const std::lock_guard lock(mutex_);
    written_ = true;
    changed_.notify_all();
  }

  PipelineJob& job_;
  const std::size_t count_;
  const int threads_;
  ProgressMeter meter_;
  std::uint64_t budget_ = 0;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Parcel> to_compute_;
  std::map<std::size_t, Parcel> to_write_;
  std::size_t taken_ = 0;        // steps whose computing has begun
  std::uint64_t work_done_ = 0;  // and is not reported yet
  std::uint64_t in_flight_ = 0;  // inputs and results, from before they are read until written
  std::uint64_t copies_ = 0;     // those of them that are copies
  bool written_ = false;
  std::exception_ptr error_;
};

}  // namespace

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

ProgressMeter::ProgressMeter(std::string stage, std::uint64_t total,
                             const ProgressCallback& callback)
    : callback_(callback), start_(steady_seconds()) {
  progress_.stage = std::move(stage);
  progress_.total = total;
}

void ProgressMeter::report(const std::string& current) {
  if (!callback_) return;
  const double now = steady_seconds() - start_;
  if (last_call_ >= 0 && now - last_call_ < 0.1) return;
  last_call_ = now;
  progress_.current = current;
  call();
}

void ProgressMeter::finish() {
  if (callback_) call();
}

void ProgressMeter::call() {
  progress_.seconds = steady_seconds() - start_;
  if (!callback_(progress_)) throw Interrupted("[" + progress_.stage + "] stopped by the caller");
}

void run_pipeline(PipelineJob& job, const std::string& stage, const ProgressCallback& progress) {
  Pipeline(job, stage, progress).run();
}

}  // namespace hqq

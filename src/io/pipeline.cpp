#include "src/io/pipeline.hpp"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

#include "hqq/error.hpp"

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
      : job_(job), count_(job.step_count()), meter_(stage, total_work(job), progress) {
    std::uint64_t largest = 0, largest_sum = 0;
    for (std::size_t i = 0; i < count_; ++i) {
      const std::uint64_t input = job.input_bytes(i), output = job.output_bytes(i);
      largest = std::max({largest, input, output});
      largest_sum = std::max(largest_sum, input + output);
    }
    // Two of the largest steps must fit, or nothing would overlap.
    budget_ = std::max({kMinBudget, 3 * largest, 2 * largest_sum});
  }

  void run() {
    std::thread reader([this] { guarded([this] { read_all(); }); });
    std::thread writer;
    // If this throws (no more threads), the reader has to be stopped before it is destroyed.
    guarded([&] { writer = std::thread([this] { guarded([this] { write_all(); }); }); });
    guarded([this] { compute_all(); });
    reader.join();
    if (writer.joinable()) writer.join();
    if (error_) std::rethrow_exception(error_);
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

  void compute_all() {
    for (std::size_t step = 0; step < count_; ++step) {
      Parcel parcel = take_waiting(step);
      parcel.tensors = job_.compute(step, std::move(parcel.tensors));
      meter_.advance(job_.step_work(step));
      const std::lock_guard lock(mutex_);
      if (job_.output_bytes(step) > 0) {
        in_flight_ -= job_.input_bytes(step);
        parcel.bytes = job_.output_bytes(step);
      }
      to_write_.push_back(std::move(parcel));
      changed_.notify_all();
    }
    std::unique_lock lock(mutex_);
    while (!written_) {
      changed_.wait_for(lock, kProgressInterval, [&] { return error_ || written_; });
      if (error_) throw Stopped();
      report(lock, count_ - 1);
    }
  }

  Parcel take_waiting(std::size_t step) {
    std::unique_lock lock(mutex_);
    report(lock, step);
    while (to_compute_.empty()) {
      changed_.wait_for(lock, kProgressInterval, [&] { return error_ || !to_compute_.empty(); });
      if (error_) throw Stopped();
      report(lock, step);
    }
    if (error_) throw Stopped();
    Parcel parcel = std::move(to_compute_.front());
    to_compute_.pop_front();
    return parcel;
  }

  // The callback runs unlocked: it may take its time.
  void report(std::unique_lock<std::mutex>& lock, std::size_t step) {
    lock.unlock();
    if (step < count_) meter_.report(job_.step_name(step));
    lock.lock();
  }

  void write_all() {
    for (std::size_t step = 0; step < count_; ++step) {
      Parcel parcel;
      {
        std::unique_lock lock(mutex_);
        wait(lock, [&] { return !to_write_.empty(); });
        parcel = std::move(to_write_.front());
        to_write_.pop_front();
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
  ProgressMeter meter_;
  std::uint64_t budget_ = 0;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Parcel> to_compute_;
  std::deque<Parcel> to_write_;
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

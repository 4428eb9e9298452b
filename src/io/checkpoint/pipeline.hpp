// Reading, computing and writing at the same time, within a bound on memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "hqq/checkpoint.hpp"

namespace hqq {

// A job is a list of steps whose results must be written in order. While step i is computed, one
// thread reads ahead and another writes what is finished.
class PipelineJob {
 public:
  virtual ~PipelineJob() = default;

  virtual std::size_t step_count() const = 0;
  // Bytes that read() returns for a step.
  virtual std::uint64_t input_bytes(std::size_t step) const = 0;
  // Bytes that compute() returns. Steps that pass their input on return 0: no new memory is taken.
  virtual std::uint64_t output_bytes(std::size_t step) const = 0;
  // Shown in Progress.
  virtual std::string step_name(std::size_t step) const = 0;
  // What Progress counts.
  virtual std::uint64_t step_work(std::size_t step) const = 0;
  // Steps that are computed at the same time.
  virtual int compute_threads() const { return 1; }

  // On the reader thread, in order of steps.
  virtual std::vector<Tensor> read(std::size_t step) = 0;
  // On the calling thread, in order; with several compute_threads() on any of them, begun in order.
  virtual std::vector<Tensor> compute(std::size_t step, std::vector<Tensor> input) = 0;
  // On the writer thread, in order; `finish` after the last step.
  virtual void write(std::size_t step, std::vector<Tensor> output) = 0;
  virtual void finish() = 0;
};

// Runs all steps. What any thread throws stops the others and is thrown here, with its own type;
// when `progress` returns false that is Interrupted. In memory at any moment: three times the
// largest input or output of a step, or twice the two together where that is more (at least 32
// MiB), and what compute() takes beside its result. Every further compute thread adds the two
// together once more.
void run_pipeline(PipelineJob& job, const std::string& stage, const ProgressCallback& progress);

// Calls a ProgressCallback at most ten times a second, and throws Interrupted when it returns
// false.
class ProgressMeter {
 public:
  ProgressMeter(std::string stage, std::uint64_t total, const ProgressCallback& callback);
  void advance(std::uint64_t amount) { progress_.done += amount; }
  void report(const std::string& current);
  // The last call, always made.
  void finish();

 private:
  void call();

  Progress progress_;
  const ProgressCallback& callback_;
  double last_call_ = -1;
  double start_;
};

// Bytes that copies of unquantized tensors take at a time.
inline constexpr std::uint64_t kCopyChunk = std::uint64_t{4} << 20;

// Seconds of a steady clock.
double steady_seconds();

}  // namespace hqq

#include "src/io/checkpoint/pipeline.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <numeric>
#include <system_error>
#include <thread>

#include "hqq/error.hpp"
#include "src/io/block_pool.hpp"
#include "tests/cpp/support/io_test_util.hpp"
#include "tests/cpp/support/message_of.hpp"

namespace hqq {
namespace {

using ::testing::HasSubstr;
using testing::message_of;

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

// Sizes are claimed, not allocated; `held` is what the job would hold.
class FakeJob : public PipelineJob {
 public:
  FakeJob(std::size_t count, std::uint64_t input, std::uint64_t output)
      : count_(count), input_(input), output_(output) {}

  std::size_t step_count() const override { return count_; }
  std::uint64_t input_bytes(std::size_t) const override { return input_; }
  std::uint64_t output_bytes(std::size_t) const override { return output_; }
  std::string step_name(std::size_t step) const override { return "step " + std::to_string(step); }
  std::uint64_t step_work(std::size_t) const override { return 10; }
  int compute_threads() const override { return threads; }

  std::vector<Tensor> read(std::size_t step) override {
    reader = std::this_thread::get_id();
    reading = std::max(reading.load(), step);
    take(input_);
    if (step == fail_read) throw FormatError("[test] read");
    return tensor(step);
  }
  std::vector<Tensor> compute(std::size_t step, std::vector<Tensor> input) override {
    EXPECT_EQ(*input.at(0).data<std::size_t>(), step);
    computing = std::max(computing.load(), step);
    // Until another thread computes the next step, or it is clear that none will.
    for (int i = 0; i < 2000 && waits && step == 0 && computing == 0; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    if (waits && step == 0) overlapped = computing > 0;
    if (slow_compute) {
      // Until the reader is ahead, or it is clear that it never will be.
      for (int i = 0; i < 2000 && step == 0 && reading == 0; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    }
    if (step == fail_compute) throw std::invalid_argument("[test] compute");
    if (output_ > 0) {
      take(output_);
      give(input_);
    }
    return tensor(step + 1000);
  }
  void write(std::size_t step, std::vector<Tensor> output) override {
    writer = std::this_thread::get_id();
    EXPECT_EQ(*output.at(0).data<std::size_t>(), step + 1000);
    if (step == fail_write) {
      throw std::system_error(std::make_error_code(std::errc::no_space_on_device), "[test] write");
    }
    if (slow_write) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    give(output_ > 0 ? output_ : input_);
    written.push_back(step);
  }
  void finish() override { finished = true; }

  std::size_t fail_read = ~std::size_t{0}, fail_compute = fail_read, fail_write = fail_read;
  bool slow_compute = false, slow_write = false, finished = false;
  int threads = 1;
  bool waits = false;                    // in step 0 for step 1
  std::atomic<bool> overlapped = false;  // whether it came
  std::vector<std::size_t> written;
  std::atomic<std::size_t> reading = 0, computing = 0;
  std::atomic<std::uint64_t> held = 0, most_held = 0;
  std::thread::id reader, writer;

 private:
  static std::vector<Tensor> tensor(std::size_t value) {
    Tensor result = Tensor::allocate(DType::kU64, {1});
    *result.data<std::size_t>() = value;
    return {result};
  }
  void take(std::uint64_t bytes) {
    const std::uint64_t now = held += bytes;
    std::uint64_t most = most_held;
    while (now > most && !most_held.compare_exchange_weak(most, now)) {
    }
  }
  void give(std::uint64_t bytes) { held -= bytes; }

  const std::size_t count_;
  const std::uint64_t input_, output_;
};

std::vector<std::size_t> upto(std::size_t count) {
  std::vector<std::size_t> result(count);
  std::iota(result.begin(), result.end(), 0);
  return result;
}

TEST(Pipeline, EveryStepInOrder) {
  FakeJob job(1000, 100, 30);
  run_pipeline(job, "test", {});
  EXPECT_EQ(job.written, upto(1000));
  EXPECT_TRUE(job.finished);
  EXPECT_EQ(job.held, 0u);
}

TEST(Pipeline, NoSteps) {
  FakeJob job(0, 1, 1);
  run_pipeline(job, "test", {});
  EXPECT_TRUE(job.finished);
}

TEST(Pipeline, ReadsAheadOnOtherThreads) {
  FakeJob job(3, 100 * kMiB, 30 * kMiB);
  job.slow_compute = true;
  run_pipeline(job, "test", {});
  EXPECT_GE(job.reading, 1u);
  EXPECT_NE(job.reader, std::this_thread::get_id());
  EXPECT_NE(job.writer, std::this_thread::get_id());
  EXPECT_NE(job.writer, job.reader);
}

TEST(Pipeline, MemoryIsBounded) {
  struct Case {
    std::uint64_t input, output, bound;
  };
  for (const Case& one : {Case{100 * kMiB, 28 * kMiB, 300 * kMiB},  // bf16 to 4 bits
                          Case{100 * kMiB, 53 * kMiB, 306 * kMiB},  // bf16 to 8 bits
                          Case{28 * kMiB, 100 * kMiB, 300 * kMiB},  // dequantize
                          Case{8 * kMiB, 0, 32 * kMiB},             // copy
                          Case{kMiB / 4, kMiB / 8, 32 * kMiB}}) {
    FakeJob job(300, one.input, one.output);
    job.slow_write = true;
    run_pipeline(job, "test", {});
    EXPECT_LE(job.most_held, one.bound) << one.input;
    EXPECT_EQ(job.written.size(), 300u);
  }
}

TEST(Pipeline, SeveralComputeThreads) {
  for (const int threads : {1, 2, 3}) {
    FakeJob job(1000, 100, 30);
    job.threads = threads;
    job.waits = true;
    run_pipeline(job, "test", {});
    EXPECT_EQ(job.written, upto(1000));
    EXPECT_EQ(job.overlapped, threads > 1) << threads;
    EXPECT_TRUE(job.finished);
    EXPECT_EQ(job.held, 0u);
  }
  FakeJob none(0, 1, 1);
  none.threads = 2;
  run_pipeline(none, "test", {});
  EXPECT_TRUE(none.finished);
}

TEST(Pipeline, MemoryOfSeveralComputeThreadsIsBounded) {
  FakeJob job(300, 100 * kMiB, 28 * kMiB);
  job.threads = 2;
  job.slow_write = true;
  job.waits = true;
  run_pipeline(job, "test", {});
  EXPECT_LE(job.most_held, (3 * 100 + 128) * kMiB);
  EXPECT_TRUE(job.overlapped);
}

TEST(Pipeline, ProgressOfSeveralComputeThreadsComesFromTheCaller) {
  FakeJob job(100, 10, 10);
  job.threads = 2;
  std::uint64_t done = 0;
  run_pipeline(job, "test", [&, caller = std::this_thread::get_id()](const Progress& progress) {
    EXPECT_EQ(std::this_thread::get_id(), caller);
    EXPECT_GE(progress.done, done);
    done = progress.done;
    return true;
  });
  EXPECT_EQ(done, 1000u);
}

class PipelineErrors : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Threads, PipelineErrors, ::testing::Values(1, 2));

TEST_P(PipelineErrors, KeepTheirType) {
  FakeJob reading(50, 10, 10), computing(50, 10, 10), writing(50, 10, 10);
  for (FakeJob* job : {&reading, &computing, &writing}) job->threads = GetParam();
  reading.fail_read = 20;
  EXPECT_EQ(message_of<FormatError>([&] { run_pipeline(reading, "test", {}); }), "[test] read");
  computing.fail_compute = 20;
  EXPECT_EQ(message_of<std::invalid_argument>([&] { run_pipeline(computing, "test", {}); }),
            "[test] compute");
  writing.fail_write = 20;
  EXPECT_THAT(message_of<std::system_error>([&] { run_pipeline(writing, "test", {}); }),
              HasSubstr("[test] write"));
  for (const FakeJob* job : {&reading, &computing, &writing}) {
    EXPECT_FALSE(job->finished);
    EXPECT_LE(job->written.size(), 20u);
  }
}

TEST(Pipeline, ProgressCountsAndStops) {
  FakeJob job(100, 10, 10);
  std::vector<Progress> calls;
  run_pipeline(job, "test", [&](const Progress& progress) {
    calls.push_back(progress);
    return true;
  });
  ASSERT_GE(calls.size(), 2u);
  EXPECT_EQ(calls.front().stage, "test");
  EXPECT_EQ(calls.front().current, "step 0");
  EXPECT_EQ(calls.front().total, 1000u);
  EXPECT_EQ(calls.back().done, 1000u);
  for (std::size_t i = 1; i < calls.size(); ++i) EXPECT_GE(calls[i].done, calls[i - 1].done);

  FakeJob stopped(100, 10, 10);
  EXPECT_THAT(message_of<Interrupted>(
                  [&] { run_pipeline(stopped, "test", [](const Progress&) { return false; }); }),
              HasSubstr("[test] stopped"));
  EXPECT_FALSE(stopped.finished);
}

TEST(Pipeline, AnErrorInTheCallbackIsThrown) {
  FakeJob job(100, 10, 10);
  EXPECT_EQ(message_of<std::runtime_error>([&] {
              run_pipeline(job, "test",
                           [](const Progress&) -> bool { throw std::runtime_error("callback"); });
            }),
            "callback");
}

TEST(BlockPool, SpareBlocksAreUsedAgain) {
  for (const std::size_t size : {std::size_t{5000}, 3 * BlockPool::kSmall}) {
    BlockPool pool;
    Buffer first = pool.take(size);
    const std::byte* place = first.data;
    EXPECT_EQ(first.size, size);
    first = {};
    const Buffer smaller = pool.take(size - 1000);
    EXPECT_EQ(smaller.data, place);
    EXPECT_EQ(smaller.size, size - 1000);
    EXPECT_NE(pool.take(size).data, place);
  }
}

TEST(BlockPool, LargeAndSmallBlocksDoNotMix) {
  BlockPool pool;
  Buffer large = pool.take(BlockPool::kSmall + 1), small = pool.take(1);
  const std::byte* large_place = large.data;
  const std::byte* small_place = small.data;
  large = {};
  small = {};
  EXPECT_EQ(pool.take(10).data, small_place);
  EXPECT_EQ(pool.take(BlockPool::kSmall + 1).data, large_place);
}

TEST(BlockPool, LargeBlocksAreAlike) {
  constexpr std::size_t kLargest = 5 * BlockPool::kSmall;
  BlockPool pool(kLargest);
  EXPECT_EQ(pool.taken(1), 1u);
  EXPECT_EQ(pool.taken(BlockPool::kSmall), BlockPool::kSmall);
  EXPECT_EQ(pool.taken(BlockPool::kSmall + 1), kLargest);
  EXPECT_EQ(pool.taken(kLargest + 1), kLargest + 1);
  Buffer buffer = pool.take(2 * BlockPool::kSmall);
  const std::byte* place = buffer.data;
  buffer = {};
  buffer = pool.take(kLargest);
  EXPECT_EQ(buffer.data, place);
  EXPECT_EQ(buffer.size, kLargest);
  buffer.data[kLargest - 1] = std::byte{1};
}

TEST(BlockPool, BuffersOutliveThePool) {
  Buffer buffer;
  {
    BlockPool pool;
    buffer = pool.take(4096);
  }
  buffer.data[4095] = std::byte{1};
  const Tensor tensor = BlockPool().allocate(DType::kF32, {3, 4});
  EXPECT_EQ(tensor.nbytes(), 48u);
  EXPECT_TRUE(BlockPool().allocate(DType::kF32, {0}));
}

}  // namespace
}  // namespace hqq

// Parallel loops where the system allows few threads or none.
#include "src/cpu/parallel.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <numeric>
#include <string>
#include <system_error>
#include <vector>

#include "hqq/quantizer.hpp"

namespace hqq {
namespace {

using cpu::parallel_for;

// The exit code of `work` in a child process that may start no thread. Root is never refused one,
// so the child becomes nobody.
int without_threads(const std::function<int()>& work) {
  const pid_t child = ::fork();
  if (child == 0) {
    const rlimit none{0, 0};
    int code = 100;
    if ((::geteuid() != 0 || ::setuid(65534) == 0) && ::setrlimit(RLIMIT_NPROC, &none) == 0) {
      try {
        code = work();
      } catch (...) {
        code = 101;
      }
    }
    ::_exit(code);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// 0 if every unit was run once.
int run_units(std::int64_t units, int threads) {
  std::vector<std::atomic<int>> runs(static_cast<std::size_t>(units));
  parallel_for(units, threads, [&](std::int64_t unit) { ++runs[static_cast<std::size_t>(unit)]; });
  for (const std::atomic<int>& count : runs) {
    if (count != 1) return 1;
  }
  return 0;
}

TEST(ParallelFor, EveryUnitOnce) {
  for (const int threads : {1, 2, 7, 64}) {
    for (const std::int64_t units : {0, 1, 5, 1000}) EXPECT_EQ(run_units(units, threads), 0);
  }
}

TEST(ParallelFor, TheFirstExceptionComesOut) {
  EXPECT_THROW(parallel_for(100, 4,
                            [](std::int64_t unit) {
                              if (unit == 57) throw std::invalid_argument("57");
                            }),
               std::invalid_argument);
}

TEST(ParallelFor, RunsWhereNoThreadCanBeStarted) {
  EXPECT_EQ(without_threads([] { return run_units(1000, 16); }), 0);
}

TEST(ParallelFor, QuantizesTheSameWhereNoThreadCanBeStarted) {
  std::vector<float> weights(64 * 128);
  std::iota(weights.begin(), weights.end(), -4000.0f);
  const TensorView view{weights.data(), DType::kF32, 64, 128};
  const auto codes = [&](int threads) {
    QuantizeOptions options;
    options.threads = threads;
    const QuantizedTensor q = Quantizer{}.quantize(view, "", options);
    const auto* bytes = reinterpret_cast<const char*>(q.W_q.buffer.data);
    return std::string(bytes, q.W_q.nbytes());
  };
  const std::string expected = codes(1);
  EXPECT_EQ(without_threads([&] { return codes(8) == expected ? 0 : 1; }), 0);
}

TEST(StartThread, SaysWhyThereIsNone) {
  EXPECT_EQ(without_threads([] {
              try {
                cpu::start_thread([] {}).join();
              } catch (const std::system_error& error) {
                return std::string(error.what()).find("ulimit -u") != std::string::npos ? 0 : 2;
              }
              return 1;
            }),
            0);
}

}  // namespace
}  // namespace hqq

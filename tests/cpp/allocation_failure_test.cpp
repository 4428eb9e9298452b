// Memory that runs out at any moment: the operation fails with std::bad_alloc or is right, frees
// what it has taken, and a destination is whole or as it was. Every allocation of every operation
// with HQQ_LONG_TESTS=1, else a sample.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <thread>

#include "hqq/checkpoint.hpp"
#include "hqq/linear.hpp"
#include "src/cpu/parallel.hpp"
#include "tests/cpp/support/failing_allocator.hpp"
#include "tests/cpp/support/model_test_util.hpp"

namespace hqq {
namespace {

namespace fs = std::filesystem;
using Contents = std::map<std::string, std::string>;
using testing::AllocationFailure;
using testing::allocator;
using testing::contents_of;
using testing::FailAllocations;
using testing::same_contents;
using testing::TempFolder;

// The failure under test, for a process that ends without a word.
AllocationFailure current;

[[noreturn]] void say_which() {
  std::fprintf(stderr, "std::terminate: allocation %lld%s failed\n",
               static_cast<long long>(current.first), current.all_after ? " and all after it" : "");
  std::abort();
}

// Most of the time would go into fsync().
const bool in_memory = ::access("/dev/shm", W_OK) == 0 && ::setenv("TMPDIR", "/dev/shm", 0) == 0;

class AllocationFailures : public ::testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    std::set_terminate(say_which);
    if (allocator.exempt.empty() && !testing::let_foreign_code_through()) {
      GTEST_SKIP() << "no nm (binutils), which finds functions that may not fail";
    }
    testing::save_model(source(), {small_layer(0), small_layer(1)});
  }

  static testing::NamedTensors small_layer(int layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    const auto seed = static_cast<unsigned>(layer);
    return {{prefix + "mlp.down_proj.weight", testing::random_tensor(DType::kBF16, {16, 64}, seed)},
            {prefix + "mlp.experts.up_proj",
             testing::random_tensor(DType::kBF16, {2, 16, 64}, seed + 9)},
            {prefix + "norm.weight", testing::random_tensor(DType::kBF16, {64}, seed + 5)}};
  }

  fs::path source() const { return folder_ / "m"; }
  fs::path out() const { return folder_ / "q"; }
  fs::path partial() const { return folder_ / "q.partial"; }

  // Calls `operation` with every failure that there is, and `check` after each: was it done?
  void each_failure(const std::function<void()>& operation,
                    const std::function<void(bool)>& check) {
    const bool every = std::getenv("HQQ_LONG_TESTS") != nullptr;
    operation();  // what is made once, as the threads of a pool
    check(true);
    std::int64_t tried = 0;
    for (std::int64_t first = 1;; first += every ? 1 : 1 + first / 8) {
      current = {first, GetParam()};
      SCOPED_TRACE(::testing::Message() << "allocation " << first << " fails");
      EXPECT_FALSE(leaks(operation, check)) << "allocations are left";
      const bool past_the_end = allocator.failed == 0;
      if (HasFailure() || past_the_end) break;
      ++tried;
    }
    EXPECT_GT(tried, 20);
    std::printf("%lld failures\n", static_cast<long long>(tried));
  }

  // A thread of a pool makes its scratch memory once; what is left every time is a leak.
  static bool leaks(const std::function<void()>& operation,
                    const std::function<void(bool)>& check) {
    for (int attempt = 0; attempt < 3; ++attempt) {
      const std::int64_t before = allocator.live;
      const bool done = succeeds(operation);
      const bool balanced = settled(before) == before;
      check(done);
      if (balanced) return false;
    }
    return true;
  }

  // Only what means that memory has run out may be thrown.
  static bool succeeds(const std::function<void()>& operation) {
    std::exception_ptr thrown;
    {
      const FailAllocations failing(current);
      try {
        operation();
      } catch (...) {
        thrown = std::current_exception();
      }
    }
    if (!thrown) return true;
    try {
      std::rethrow_exception(thrown);
    } catch (const std::bad_alloc&) {
    } catch (const std::system_error& error) {
      EXPECT_EQ(error.code(), std::errc::not_enough_memory) << error.what();
    } catch (const std::exception& error) {
      ADD_FAILURE() << "another error: " << error.what();
    }
    return false;
  }

  // Threads of a pool free their last task when nobody waits for them any more.
  static std::int64_t settled(std::int64_t expected) {
    for (int i = 0; i < 100 && allocator.live != expected; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return allocator.live;
  }

  // `write` makes the folder out(): it is there and right, or not there at all.
  void each_failure_of_writing(const std::function<void()>& write) {
    write();
    const Contents expected = contents_of(out());
    fs::remove_all(out());
    each_failure(write, [&](bool done) {
      EXPECT_TRUE(!done || fs::exists(out()));
      EXPECT_TRUE(!fs::exists(out()) || same_contents(contents_of(out()), expected));
      fs::remove_all(out());
      fs::remove_all(partial());
    });
  }

  QuantizeReport quantize(int threads, bool resume = false, bool force = false) {
    HqqConfig config;
    config.defaults.group_size = 32;
    QuantizeCheckpointOptions options;
    options.threads = threads;
    options.resume = resume;
    options.force = force;
    return quantize_checkpoint(source(), out(), config, options);
  }

  // out() without column scales, which upstream cannot hold, as a source of other commands.
  fs::path quantized() {
    HqqConfig config;
    config.defaults.group_size = 32;
    config.defaults.balance = Balance::kNone;
    config.skip_modules = {"experts"};
    quantize_checkpoint(source(), folder_ / "ours", config);
    return folder_ / "ours";
  }

  const TempFolder folder_;
};

INSTANTIATE_TEST_SUITE_P(FromThereOn, AllocationFailures, ::testing::Bool(),
                         [](const auto& info) { return info.param ? "All" : "One"; });

TEST_P(AllocationFailures, QuantizeAndResume) {
  for (const int threads : {1, 3}) {
    quantize(threads);
    const Contents expected = contents_of(out());
    fs::remove_all(out());
    each_failure([&] { quantize(threads); },
                 [&](bool done) {
                   EXPECT_TRUE(!done || fs::exists(out()));
                   quantize(threads, true);
                   EXPECT_TRUE(same_contents(contents_of(out()), expected));
                   EXPECT_FALSE(fs::exists(partial()));
                   fs::remove_all(out());
                 });
  }
}

TEST_P(AllocationFailures, ResumeOfAFinishedFolder) {
  quantize(1);
  const Contents expected = contents_of(out());
  each_failure([&] { quantize(1, true); },
               [&](bool) { EXPECT_TRUE(same_contents(contents_of(out()), expected)); });
}

TEST_P(AllocationFailures, ForceKeepsTheOldFolderUntilTheNewOneIsWhole) {
  quantize(1);
  const Contents expected = contents_of(out());
  each_failure([&] { quantize(1, false, true); },
               [&](bool) {
                 EXPECT_TRUE(same_contents(contents_of(out()), expected));
                 fs::remove_all(partial());
               });
}

TEST_P(AllocationFailures, ConvertAndBack) {
  const fs::path ours = quantized(), upstream = folder_ / "upstream";
  convert_checkpoint(ours, upstream, CheckpointFormat::kUpstream);
  each_failure_of_writing([&] { convert_checkpoint(ours, out(), CheckpointFormat::kUpstream); });
  each_failure_of_writing([&] { convert_checkpoint(upstream, out(), CheckpointFormat::kHqqCpp); });
}

TEST_P(AllocationFailures, Dequantize) {
  const fs::path ours = quantized();
  each_failure_of_writing([&] { dequantize_checkpoint(ours, out(), DType::kF32); });
}

TEST_P(AllocationFailures, VerifyAndDiff) {
  const fs::path ours = quantized();
  std::size_t problems = 0;
  each_failure([&] { problems = verify_checkpoint(ours).problems.size(); },
               [&](bool) { EXPECT_EQ(problems, 0u); });
  std::ptrdiff_t different = 0;
  const auto differs = [](const TensorDiff& diff) { return !diff.identical; };
  each_failure([&] { different = std::ranges::count_if(diff_checkpoints(ours, ours), differs); },
               [&](bool) { EXPECT_EQ(different, 0); });
}

TEST_P(AllocationFailures, QuantizeAndMultiplyInMemory) {
  const Tensor weight = testing::random_tensor(DType::kF32, {48, 64}, 1);
  const Tensor x = testing::random_tensor(DType::kF32, {4, 64}, 2);
  const Quantizer quantizer;
  std::vector<float> y(4 * 48);
  const auto multiply = [&] {
    const QuantizedTensor q = quantizer.quantize(TensorView(weight));
    linear(TensorView(x), tile(q, {3}), {}, y.data(), {LinearMode::kExact, 3});
  };
  multiply();
  const std::vector<float> expected = y;
  each_failure(multiply, [&](bool done) { EXPECT_TRUE(!done || y == expected); });
}

// Pools live as long as the process, so each failure gets one of its own.
TEST_P(AllocationFailures, MakingAPool) {
  for (int first = 1; first <= 60; ++first) {
    current = {first, GetParam()};
    const int threads = 4 + first / 8;
    std::atomic<int> units = 0;
    if (succeeds([&] { cpu::parallel_for(100, threads, [&](std::int64_t) { ++units; }); })) {
      EXPECT_EQ(units, 100);
    }
  }
}

}  // namespace
}  // namespace hqq

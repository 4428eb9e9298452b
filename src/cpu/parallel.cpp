#include "src/cpu/parallel.hpp"

#include <unistd.h>

#include <atomic>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <unsupported/Eigen/CXX11/ThreadPool>

namespace hqq::cpu {
namespace {

// Pools live as long as the process: making one costs more than a small layer. A child process of
// fork() has no threads, so it starts with none of its parent's pools (which are leaked there on
// purpose).
Eigen::ThreadPool& pool(int threads) {
  static std::mutex mutex;
  static std::map<std::pair<pid_t, int>, Eigen::ThreadPool*> pools;
  const std::lock_guard<std::mutex> lock(mutex);
  Eigen::ThreadPool*& entry = pools[{getpid(), threads}];
  // Never deleted: joining threads during static destruction deadlocks when a library is unloaded.
  if (entry == nullptr) entry = new Eigen::ThreadPool(threads);
  return *entry;
}

}  // namespace

void parallel_for(std::int64_t units, int threads, const std::function<void(std::int64_t)>& fn) {
  if (units < threads) threads = static_cast<int>(units);
  if (threads <= 1) {
    for (std::int64_t unit = 0; unit < units; ++unit) fn(unit);
    return;
  }
  std::atomic<std::int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;
  const auto work = [&] {
    try {
      for (std::int64_t unit = next++; unit < units; unit = next++) fn(unit);
    } catch (...) {
      next = units;
      const std::lock_guard<std::mutex> lock(mutex);
      if (failure == nullptr) failure = std::current_exception();
    }
  };
  Eigen::Barrier barrier(static_cast<unsigned>(threads - 1));
  Eigen::ThreadPool& workers = pool(threads - 1);
  for (int i = 0; i + 1 < threads; ++i) {
    workers.Schedule([&] {
      work();
      barrier.Notify();
    });
  }
  work();
  barrier.Wait();
  if (failure != nullptr) std::rethrow_exception(failure);
}

}  // namespace hqq::cpu

#include "src/cpu/parallel.hpp"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
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

// The entry into a parallel region of GCC's OpenMP runtime, which LLVM's and Intel's have too.
using OpenMpRegion = void (*)(void (*)(void*), void* data, unsigned threads, unsigned flags);

// That of the process, or null. torch makes its runtime visible to all. Its idle threads keep
// spinning for some milliseconds, so threads of our own beside them would get half of a core each:
// we join its team.
OpenMpRegion openmp_region() {
  static std::atomic<OpenMpRegion> found{nullptr};
  OpenMpRegion region = found.load(std::memory_order_relaxed);
  if (region == nullptr) {
    // Asked again every time: torch may be imported later.
    region = reinterpret_cast<OpenMpRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.store(region, std::memory_order_relaxed);
  }
  return region;
}

// The process that loaded this library. In a child of fork() the team of an OpenMP runtime has lost
// its threads, and joining it hangs.
const pid_t loading_process = getpid();

// About 50 microseconds.
constexpr int kSpins = 2000;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Runs work() on up to `threads` threads including this one.
template <class Work>
void run_on_threads(int threads, Work& work) {
  const OpenMpRegion region = getpid() == loading_process ? openmp_region() : nullptr;
  if (region != nullptr) {
    region([](void* data) { (*static_cast<Work*>(data))(); }, &work, static_cast<unsigned>(threads),
           0);
    return;
  }
  Eigen::Barrier barrier(static_cast<unsigned>(threads - 1));
  std::atomic<int> working{threads - 1};
  Eigen::ThreadPool& workers = pool(threads - 1);
  for (int i = 0; i + 1 < threads; ++i) {
    workers.Schedule([&] {
      work();
      working.fetch_sub(1, std::memory_order_release);
      barrier.Notify();
    });
  }
  work();
  // The others finish soon, and waking up takes longer than a small layer does.
  for (int i = 0; i < kSpins && working.load(std::memory_order_acquire) > 0; ++i) pause();
  barrier.Wait();
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
  auto work = [&] {
    try {
      for (std::int64_t unit = next++; unit < units; unit = next++) fn(unit);
    } catch (...) {
      next = units;
      const std::lock_guard<std::mutex> lock(mutex);
      if (failure == nullptr) failure = std::current_exception();
    }
  };
  run_on_threads(threads, work);
  if (failure != nullptr) std::rethrow_exception(failure);
}

}  // namespace hqq::cpu

#include "src/cpu/parallel.hpp"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <exception>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <unsupported/Eigen/CXX11/ThreadPool>
#include <vector>

namespace hqq::cpu {
namespace {

// A thread that waits for what it is to run.
class WaitingThread {
 public:
  WaitingThread()
      : thread_(start_thread([this] {
          if (const std::function<void()> work = work_.get_future().get()) work();
        })) {}
  ~WaitingThread() {
    if (!has_work_) work_.set_value(nullptr);
    thread_.join();
  }
  void run(std::function<void()> work) {
    has_work_ = true;
    work_.set_value(std::move(work));
  }
  void OnCancel() {}  // of Eigen

 private:
  std::promise<std::function<void()>> work_;
  bool has_work_ = false;
  std::thread thread_;
};

using WaitingThreads = std::vector<std::unique_ptr<WaitingThread>>;

// Up to `count`: fewer where the system allows no more.
WaitingThreads start_waiting_threads(int count) {
  WaitingThreads threads;
  try {
    for (int i = 0; i < count; ++i) threads.push_back(std::make_unique<WaitingThread>());
  } catch (const std::system_error&) {
  } catch (const std::bad_alloc&) {
  }
  return threads;
}

// Gives an Eigen pool threads that run already: its own would be lost with the pool half built
// where one cannot be started.
struct StartedThreads {
  using EnvThread = WaitingThread;
  struct Task {
    std::function<void()> f;
  };
  std::shared_ptr<WaitingThreads> threads;

  EnvThread* CreateThread(std::function<void()> f) {
    std::unique_ptr<WaitingThread> thread = std::move(threads->back());
    threads->pop_back();
    thread->run(std::move(f));
    return thread.release();
  }
  Task CreateTask(std::function<void()> f) { return Task{std::move(f)}; }
  void ExecuteTask(const Task& task) { task.f(); }
};

using Pool = Eigen::ThreadPoolTempl<StartedThreads>;

// Pools live as long as the process: making one costs more than a small layer. A child process of
// fork() has no threads, so it starts with none of its parent's pools (which are leaked there on
// purpose). A pool may have fewer threads than it was asked for; null: none could be started.
Pool* pool(int threads) {
  static std::mutex mutex;
  static std::map<std::pair<pid_t, int>, Pool*> pools;
  const std::lock_guard<std::mutex> lock(mutex);
  Pool*& entry = pools[{getpid(), threads}];
  if (entry == nullptr) {
    auto started = std::make_shared<WaitingThreads>(start_waiting_threads(threads));
    const int count = static_cast<int>(started->size());
    // Never deleted: joining threads during static destruction deadlocks when a library is
    // unloaded.
    if (count > 0) entry = new Pool(count, StartedThreads{std::move(started)});
  }
  return entry;
}

// The entry into a parallel region of GCC's OpenMP runtime, which LLVM's and Intel's have too.
using OpenMpRegion = void (*)(void (*)(void*), void* data, unsigned threads, unsigned flags);

// The OpenMP runtime of the process, or null. torch makes its runtime visible to all. Its idle
// threads keep spinning for some milliseconds, so threads of our own beside them would get half of
// a core each: we join its team.
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
  Pool* workers = pool(threads - 1);
  if (workers == nullptr) return work();
  const int others = std::min(threads - 1, workers->NumThreads());
  Eigen::Barrier barrier(static_cast<unsigned>(others));
  std::atomic<int> working{others};
  const auto done = [&] {
    working.fetch_sub(1, std::memory_order_release);
    barrier.Notify();
  };
  int scheduled = 0;
  try {
    for (; scheduled < others; ++scheduled) {
      workers->Schedule([&] {
        work();
        done();
      });
    }
  } catch (const std::bad_alloc&) {
    // Those that are on their way use this frame: nobody may leave it. There are fewer, then.
    for (; scheduled < others; ++scheduled) done();
  }
  work();
  // The others finish soon, and waking up takes longer than a small layer does.
  for (int i = 0; i < kSpins && working.load(std::memory_order_acquire) > 0; ++i) pause();
  barrier.Wait();
}

}  // namespace

std::thread start_thread(std::function<void()> work) {
  try {
    return std::thread(std::move(work));
  } catch (const std::system_error& error) {
    throw std::system_error(error.code(),
                            "[threads] cannot start a thread; this user or container may have no "
                            "more (ulimit -u), or no memory for its stack (ulimit -v)");
  }
}

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

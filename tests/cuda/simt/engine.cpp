#include "tests/cuda/simt/engine.hpp"

#include <boost/context/fiber.hpp>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <utility>
#include <vector>

#include "tests/cuda/simt/memory.hpp"

namespace hqq::simt {
namespace {

namespace context = boost::context;

constexpr std::size_t kStackBytes = 128 * 1024;
constexpr unsigned kMaxThreads = 1024;  // a block's limit
constexpr int kCopyBytes = 16;

// Stacks are used again by the next block.
class Stacks {
 public:
  context::stack_context allocate() {
    if (free_.empty()) {
      storage_.emplace_back(kStackBytes);
      free_.push_back(storage_.back().data());
    }
    context::stack_context stack;
    stack.size = kStackBytes;
    stack.sp = free_.back() + kStackBytes;
    free_.pop_back();
    return stack;
  }
  void deallocate(context::stack_context& stack) {
    free_.push_back(static_cast<unsigned char*>(stack.sp) - kStackBytes);
  }

 private:
  std::deque<std::vector<unsigned char>> storage_;
  std::vector<unsigned char*> free_;
};

struct StackAllocator {
  Stacks* stacks;
  context::stack_context allocate() { return stacks->allocate(); }
  void deallocate(context::stack_context& stack) { stacks->deallocate(stack); }
};

// Thrown in a thread to leave the kernel: `Problem` where it happened, `Stop` in all others.
struct Problem {
  std::string what;
};
struct Stop {};

enum class State { kReady, kAtBarrier, kInWarpStep, kDone };

struct AsyncCopy {
  void* shared;
  const void* global;
  bool copy;
};

struct Thread {
  ThreadView view;
  Moment moment;
  State state = State::kReady;
  Location barrier;
  context::fiber fiber, scheduler;
  std::deque<std::vector<AsyncCopy>> groups;  // committed
  std::vector<AsyncCopy> group;               // not yet
};

// Lanes that wait for the others of their mask.
struct PendingStep {
  unsigned mask = 0;
  unsigned arrived = 0;
  const char* name = nullptr;
  Location at;
  void* lanes[kWarpSize] = {};
};

struct Warp {
  std::uint32_t phase = 0;
  std::vector<PendingStep> steps;
};

std::string place(const Location& at) {
  const char* name = std::strrchr(at.file_name(), '/');
  return std::string(name == nullptr ? at.file_name() : name + 1) + ":" + std::to_string(at.line());
}

bool same_place(const Location& a, const Location& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

std::string text(const Dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

class Engine {
 public:
  std::string run(const Launch& launch, const std::function<void()>& body) {
    const std::uint64_t threads = std::uint64_t{launch.block.x} * launch.block.y * launch.block.z;
    if (threads == 0 || threads > kMaxThreads) {
      return "a block has " + std::to_string(threads) + " threads; 1 to 1024 are possible";
    }
    if (launch.shared_bytes > SharedMemory::kMaxBytes) {
      return "a block asks for " + std::to_string(launch.shared_bytes) +
             " bytes of shared memory; a GPU has at most " +
             std::to_string(SharedMemory::kMaxBytes);
    }
    error_.clear();
    Dim3 block;
    for (block.z = 0; block.z < launch.grid.z; ++block.z) {
      for (block.y = 0; block.y < launch.grid.y; ++block.y) {
        for (block.x = 0; block.x < launch.grid.x; ++block.x) {
          run_block(launch, block, body);
          if (!error_.empty()) return error_;
        }
      }
    }
    return "";
  }

  Thread& current() { return *current_; }
  SharedMemory& shared() { return shared_; }

  void block_barrier(const Location& at) {
    current_->barrier = at;
    wait(State::kAtBarrier);
  }

  void warp_step(unsigned mask, const char* name, void* operands, WarpStep step,
                 const Location& at) {
    Thread& self = *current_;
    const unsigned lane = self.moment.thread % kWarpSize;
    Warp& warp = warps_[self.moment.thread / kWarpSize];
    if ((mask >> lane & 1u) == 0) fail(std::string(name) + ": the mask lacks the calling lane");
    std::size_t index = 0;
    while (index < warp.steps.size() && warp.steps[index].mask != mask) ++index;
    if (index == warp.steps.size()) {
      warp.steps.push_back({mask, 0, name, at, {}});
    }
    PendingStep& pending = warp.steps[index];
    if (!same_place(pending.at, at)) {
      fail("lanes of a warp meet in different operations: " + std::string(pending.name) + " at " +
           place(pending.at) + " and " + name + " at " + place(at));
    }
    pending.arrived |= 1u << lane;
    pending.lanes[lane] = operands;
    if (pending.arrived != mask) return wait(State::kInWarpStep);
    const PendingStep complete = pending;
    warp.steps.erase(warp.steps.begin() + static_cast<std::ptrdiff_t>(index));
    if (step != nullptr) {
      step(complete.lanes);
    } else {
      ++warp.phase;
    }
    const unsigned first = self.moment.thread / kWarpSize * kWarpSize;
    for (unsigned l = 0; l < kWarpSize; ++l) {
      if ((mask >> l & 1u) == 0) continue;
      Thread& other = threads_[first + l];
      other.state = State::kReady;
      other.moment.warp_phase = warp.phase;
    }
  }

 private:
  void run_block(const Launch& launch, const Dim3& block, const std::function<void()>& body) {
    const unsigned count = launch.block.x * launch.block.y * launch.block.z;
    shared_.reset(launch.shared_bytes);
    threads_ = std::vector<Thread>(count);
    warps_ = std::vector<Warp>((count + kWarpSize - 1) / kWarpSize);
    stopping_ = false;
    for (unsigned i = 0; i < count; ++i) start(launch, block, body, i);
    for (bool forward = true;; forward = !forward) {
      if (!pass(forward) && !release_barrier()) break;
    }
    if (error_.empty()) return;
    stopping_ = true;
    for (Thread& thread : threads_) {
      if (thread.state != State::kDone) resume(thread);
    }
  }

  void start(const Launch& launch, const Dim3& block, const std::function<void()>& body,
             unsigned i) {
    Thread& thread = threads_[i];
    const Dim3 index{i % launch.block.x, i / launch.block.x % launch.block.y,
                     i / (launch.block.x * launch.block.y)};
    thread.view = {index, block, launch.block, launch.grid};
    thread.moment.thread = static_cast<std::uint16_t>(i);
    thread.fiber = context::fiber(std::allocator_arg, StackAllocator{&stacks_},
                                  [this, &thread, &body](context::fiber&& scheduler) {
                                    thread.scheduler = std::move(scheduler);
                                    try {
                                      body();
                                    } catch (const Problem& problem) {
                                      error_ = problem.what + " (thread " +
                                               text(thread.view.thread) + " of block " +
                                               text(thread.view.block) + ")";
                                    } catch (const Stop&) {
                                    }
                                    thread.state = State::kDone;
                                    return std::move(thread.scheduler);
                                  });
  }

  void resume(Thread& thread) {
    current_ = &thread;
    thread.fiber = std::move(thread.fiber).resume();
    current_ = nullptr;
  }

  // Runs whoever can run; both orders, so that no kernel relies on one. False: nobody could.
  bool pass(bool forward) {
    bool progress = false;
    const std::size_t count = threads_.size();
    for (std::size_t k = 0; k < count; ++k) {
      Thread& thread = threads_[forward ? k : count - 1 - k];
      if (thread.state != State::kReady) continue;
      resume(thread);
      progress = true;
      if (!error_.empty()) return false;
    }
    return progress;
  }

  // Nobody can run: either all wait at one barrier, or the block is done, or it would hang.
  bool release_barrier() {
    if (!error_.empty()) return false;
    const Thread* waiting = nullptr;
    std::size_t done = 0;
    for (const Thread& thread : threads_) {
      if (thread.state == State::kDone) ++done;
      if (thread.state == State::kAtBarrier && waiting == nullptr) waiting = &thread;
      if (thread.state == State::kInWarpStep) {
        const PendingStep& step = warps_[thread.moment.thread / kWarpSize].steps.front();
        error_ = std::string(step.name) + " at " + place(step.at) +
                 " waits for lanes of its mask that never come (thread " +
                 text(thread.view.thread) + " of block " + text(thread.view.block) + ")";
        return false;
      }
    }
    if (done == threads_.size()) return false;
    if (done > 0) {
      error_ = "divergent barrier: " + std::to_string(done) +
               " threads have left the kernel while " + std::to_string(threads_.size() - done) +
               " wait at " + place(waiting->barrier) + " (block " + text(waiting->view.block) + ")";
      return false;
    }
    for (Thread& thread : threads_) {
      if (!same_place(thread.barrier, waiting->barrier)) {
        error_ = "divergent barrier: threads wait at " + place(waiting->barrier) + " and at " +
                 place(thread.barrier) + " (block " + text(waiting->view.block) + ")";
        return false;
      }
    }
    for (Thread& thread : threads_) {
      thread.state = State::kReady;
      ++thread.moment.block_phase;
    }
    return true;
  }

  void wait(State state) {
    Thread& self = *current_;
    self.state = state;
    self.scheduler = std::move(self.scheduler).resume();
    if (stopping_) throw Stop{};
  }

  Stacks stacks_;
  SharedMemory shared_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Thread* current_ = nullptr;
  std::string error_;
  bool stopping_ = false;
};

// One GPU: launches of several host threads follow each other.
std::mutex engine_mutex;
Engine& engine() {
  static Engine one;
  return one;
}

void require(const std::string& problem) {
  if (!problem.empty()) fail(problem);
}

void finish_group(Thread& thread) {
  SharedMemory& shared = engine().shared();
  for (const AsyncCopy& copy : thread.groups.front()) {
    require(shared.end_copy(copy.shared, kCopyBytes, thread.moment));
    if (copy.copy) {
      std::memcpy(copy.shared, copy.global, kCopyBytes);
    } else {
      std::memset(copy.shared, 0, kCopyBytes);
    }
  }
  thread.groups.pop_front();
}

}  // namespace

const ThreadView& this_thread() { return engine().current().view; }

std::string run(const Launch& launch, const std::function<void()>& body) {
  const std::lock_guard lock(engine_mutex);
  return engine().run(launch, body);
}

void fail(const std::string& what) { throw Problem{what}; }

void block_barrier(const Location& at) { engine().block_barrier(at); }

void warp_step(unsigned mask, const char* name, void* operands, WarpStep step, const Location& at) {
  engine().warp_step(mask, name, operands, step, at);
}
void warp_barrier(unsigned mask, const Location& at) {
  engine().warp_step(mask, "__syncwarp", nullptr, nullptr, at);
}

unsigned char* shared_arena() { return engine().shared().data(); }

void check_shared(const void* p, std::size_t size, Access access) {
  SharedMemory& shared = engine().shared();
  const Moment& now = engine().current().moment;
  require(access == Access::kRead ? shared.read(p, size, now) : shared.write(p, size, now));
}

void copy_async(void* shared, const void* global, bool copy) {
  Thread& thread = engine().current();
  if (copy) check_global(global, kCopyBytes, kCopyBytes);
  require(engine().shared().begin_copy(shared, kCopyBytes, thread.moment));
  thread.group.push_back({shared, global, copy});
}

void copy_async_commit() {
  Thread& thread = engine().current();
  thread.groups.push_back(std::exchange(thread.group, {}));
}

void copy_async_wait(int pending) {
  Thread& thread = engine().current();
  while (thread.groups.size() > static_cast<std::size_t>(pending)) finish_group(thread);
}

}  // namespace hqq::simt

// Parallel loops on Eigen's thread pool, and threads.
#pragma once

#include <cstdint>
#include <functional>
#include <thread>

namespace hqq::cpu {

// Calls fn(unit) once for every unit in [0, units), on up to `threads` threads including this one,
// and returns when all are done. The first exception stops the loop and is rethrown. Units must be
// independent.
void parallel_for(std::int64_t units, int threads, const std::function<void(std::int64_t)>& fn);

// A thread. Throws std::system_error, saying what limits there are, where none can be started.
std::thread start_thread(std::function<void()> work);

}  // namespace hqq::cpu

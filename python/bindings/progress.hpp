// Long work with a Python callback and Ctrl-C.
#pragma once

#include "hqq/checkpoint.hpp"
#include "python/bindings/common.hpp"

namespace hqq::python {

// Runs work(callback) on a thread of its own without the GIL, while the calling thread answers the
// callback (`progress(Progress)`, or None) and looks for signals ten times a second. An exception
// of the callback or of a signal handler stops the work and is thrown here in place of Interrupted.
void run_with_progress(const py::object& progress,
                       const std::function<void(const ProgressCallback&)>& work);

}  // namespace hqq::python

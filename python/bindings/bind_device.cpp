// Threads and CPU targets: include/hqq/device.hpp and src/cpu/dispatch.hpp.
#include "hqq/device.hpp"
#include "python/bindings/common.hpp"
#include "src/backend.hpp"
#include "src/cpu/dispatch.hpp"

namespace hqq::python {
namespace {

constexpr const char* kTargetsDoc = R"doc(Instruction sets that this machine can run, best first.

Example:
    >>> "scalar" in hqq_cpp.cpu_targets()
    True
)doc";
constexpr const char* kTargetDoc = R"doc(The instruction set in use.

The best one, or the one that the environment variable ``HQQ_CPU_TARGET`` named when the library
first needed it. Results do not depend on it.

Example:
    >>> hqq_cpp.cpu_target() in hqq_cpp.cpu_targets()
    True
)doc";
constexpr const char* kThreadsDoc = R"doc(Threads that ``threads=0`` means.

``HQQ_NUM_THREADS`` if it is set to a positive number, else the processors this process may run on.

Example:
    >>> hqq_cpp.default_threads() > 0
    True
)doc";
constexpr const char* kCudaDoc =
    R"doc(True if libhqq_cuda was found and can use a GPU; 'hqq-cpp doctor' says why not.

Example:
    >>> isinstance(hqq_cpp.cuda_is_available(), bool)
    True
)doc";

}  // namespace

void bind_device(py::module_& m) {
  m.def("cpu_targets", &cpu::supported_targets, kTargetsDoc);
  m.def("cpu_target", &cpu::current_target, kTargetDoc);
  m.def("default_threads", &default_threads, kThreadsDoc);
  m.def("cuda_is_available", &cuda::is_available, kCudaDoc);
}

}  // namespace hqq::python

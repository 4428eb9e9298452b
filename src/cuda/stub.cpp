// hqq::cuda in a library that was built without CUDA.
#include "hqq/error.hpp"
#include "src/backend.hpp"
#include "src/cuda/library.hpp"
#include "src/cuda/solve.hpp"

namespace hqq::cuda {
namespace {

constexpr const char* kRefusal = "[cuda] this library was built without CUDA; use device cpu";

[[noreturn]] void refuse() { throw CudaError(kRefusal); }

}  // namespace

void quantize(const QuantizeTask&, QuantizedTensor&) { refuse(); }
std::shared_ptr<void> keep_memory(int) { refuse(); }
bool is_available() { return false; }

const Api& library() { refuse(); }
void require_device(int) { refuse(); }
Description describe() {
  Description result;
  result.problem = kRefusal;
  return result;
}

DeviceMatrix device_matrix(const QuantizedTensor&, const TensorAddresses&) { refuse(); }
std::size_t solve_workspace_bytes(const DeviceTask&) { refuse(); }
void solve(const DeviceTask&, void*, std::size_t, StreamHandle) { refuse(); }

}  // namespace hqq::cuda

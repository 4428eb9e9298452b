// hqq::cuda in a library that was built without CUDA.
#include "hqq/error.hpp"
#include "src/backend.hpp"

namespace hqq::cuda {
namespace {

[[noreturn]] void refuse() {
  throw CudaError("[cuda] this library was built without CUDA; use device cpu");
}

}  // namespace

void quantize(const QuantizeTask&, QuantizedTensor&) { refuse(); }
void dequantize(const QuantizedTensor&, Tensor&, int) { refuse(); }
void linear(std::span<const LinearTask>, int) { refuse(); }
bool is_available() { return false; }

}  // namespace hqq::cuda

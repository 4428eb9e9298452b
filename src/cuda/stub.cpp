// src/cuda/library.cpp in a library that was built without CUDA: there is nothing to load.
#include "hqq/error.hpp"
#include "src/backend.hpp"
#include "src/cuda/library.hpp"

namespace hqq::cuda {
namespace {

constexpr const char* kRefusal = "[cuda] this library was built without CUDA; use device cpu";

[[noreturn]] void refuse() { throw CudaError(kRefusal); }

}  // namespace

bool is_available() { return false; }
const Api& library() { refuse(); }
void require_device(int) { refuse(); }
Description describe() {
  Description result;
  result.problem = kRefusal;
  return result;
}

}  // namespace hqq::cuda

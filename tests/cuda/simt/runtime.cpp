// The runtime functions of include/cuda_runtime.h.
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>

#include "tests/cuda/simt/memory.hpp"

namespace {

// Like cudart's: of the thread, until it is asked for.
thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string launch_problem;

constexpr std::size_t kTotalMemory = std::size_t{1} << 30;

cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// Tests of failing allocations: HQQ_SIMT_MEMORY is the number of bytes that the device has.
std::size_t total_memory() {
  const char* text = std::getenv("HQQ_SIMT_MEMORY");
  return text == nullptr ? kTotalMemory : std::strtoull(text, nullptr, 10);
}
// And HQQ_SIMT_DRIVER the version of its driver, 0: none is installed.
int driver_version() {
  const char* text = std::getenv("HQQ_SIMT_DRIVER");
  return text == nullptr ? 13000 : std::atoi(text);
}
// And HQQ_SIMT_COMPUTE its compute capability, as 90.
int compute_capability() {
  const char* text = std::getenv("HQQ_SIMT_COMPUTE");
  return text == nullptr ? 90 : std::atoi(text);
}

// And HQQ_SIMT_CAPTURING (set) says that all streams are being recorded; "implicit": the error of
// the default stream while another one is.
cudaError_t capture_status(cudaStreamCaptureStatus* status) {
  const char* text = std::getenv("HQQ_SIMT_CAPTURING");
  if (text != nullptr && std::strcmp(text, "implicit") == 0) {
    return report(cudaErrorStreamCaptureImplicit);
  }
  *status = text == nullptr ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

}  // namespace

namespace hqq::simt {
cudaError_t report_launch(const std::string& problem) {
  if (problem.empty()) return cudaSuccess;
  launch_problem = problem;
  return report(cudaErrorLaunchFailure);
}
}  // namespace hqq::simt

cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver_version();
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = driver_version() == 0 ? 0 : 1;
  return report(*count == 0 ? cudaErrorNoDevice : cudaSuccess);
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  return report(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device != 0) return report(cudaErrorInvalidDevice);
  std::strcpy(properties->name, "SIMT shim");
  properties->totalGlobalMem = total_memory();
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return report(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = compute_capability() / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = compute_capability() % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(hqq::simt::SharedMemory::kMaxBytes);
      return cudaSuccess;
  }
  return report(cudaErrorInvalidValue);
}
cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  if (hqq::simt::allocated_bytes() + bytes > total_memory()) {
    return report(cudaErrorMemoryAllocation);
  }
  *memory = hqq::simt::allocate_global(bytes);
  return report(*memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess);
}
cudaError_t cudaFree(void* memory) {
  if (memory == nullptr || hqq::simt::release_global(memory)) return cudaSuccess;
  return report(cudaErrorInvalidValue);
}
cudaError_t cudaMallocHost(void** memory, std::size_t bytes) {
  *memory = std::malloc(bytes);
  return report(*memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess);
}
cudaError_t cudaFreeHost(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = nullptr;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return capture_status(status);
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchFailure:
      return launch_problem.c_str();
    case cudaErrorStreamCaptureImplicit:
      return "operation would make the legacy stream depend on a capturing blocking stream";
  }
  return "unknown error";
}
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorStreamCaptureImplicit:
      return "cudaErrorStreamCaptureImplicit";
  }
  return "cudaErrorUnknown";
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  const auto limit = static_cast<int>(hqq::simt::SharedMemory::kMaxBytes);
  return report(value <= limit ? cudaSuccess : cudaErrorInvalidValue);
}

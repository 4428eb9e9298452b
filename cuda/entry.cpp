// The table of api.hpp: exceptions become a Status and a text.
#include <algorithm>
#include <iterator>
#include <string>

#include "cuda/dequantize.hpp"
#include "cuda/linear/linear.hpp"
#include "cuda/pack.hpp"
#include "cuda/quantize.hpp"
#include "cuda/runtime.hpp"
#include "cuda/tiles.hpp"

namespace hqq::cuda {
namespace {

thread_local std::string last_text;

template <class Fn>
Status guarded(const Fn& fn) noexcept {
  try {
    fn();
    return Status::kOk;
  } catch (const Failure& failure) {
    last_text = failure.what();
    return failure.status;
  } catch (const std::exception& error) {
    last_text = error.what();
    return Status::kCudaError;
  }
}

cudaStream_t as_stream(StreamHandle stream) { return static_cast<cudaStream_t>(stream); }

const char* error_text() { return last_text.c_str(); }

Status driver_info(DriverInfo* out) {
  return guarded([&] {
    HQQ_CUDA_CHECK(cudaDriverGetVersion(&out->driver_version));
    HQQ_CUDA_CHECK(cudaRuntimeGetVersion(&out->runtime_version));
  });
}

Status device_count(int* out) {
  return guarded([&] {
    *out = 0;
    const cudaError_t error = cudaGetDeviceCount(out);
    if (error == cudaErrorNoDevice) {
      cudaGetLastError();
      return;
    }
    HQQ_CUDA_CHECK(error);
  });
}

Status set_device(int device, int* previous) {
  return guarded([&] {
    HQQ_CUDA_CHECK(cudaGetDevice(previous));
    if (*previous != device) HQQ_CUDA_CHECK(cudaSetDevice(device));
  });
}

Status device_info(int device, DeviceInfo* out) {
  return guarded([&] {
    cudaDeviceProp properties;
    HQQ_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    static_assert(sizeof(out->name) == sizeof(properties.name));
    std::copy(std::begin(properties.name), std::end(properties.name), out->name);
    out->total_memory = properties.totalGlobalMem;
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      HQQ_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
      return value;
    };
    out->compute_major = attribute(cudaDevAttrComputeCapabilityMajor);
    out->compute_minor = attribute(cudaDevAttrComputeCapabilityMinor);
    out->multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  });
}

Status allocate(std::size_t bytes, void** out) {
  return guarded([&] { HQQ_CUDA_CHECK(cudaMalloc(out, bytes)); });
}
Status release(void* memory) {
  return guarded([&] { HQQ_CUDA_CHECK(cudaFree(memory)); });
}
Status allocate_pinned(std::size_t bytes, void** out) {
  return guarded([&] { HQQ_CUDA_CHECK(cudaMallocHost(out, bytes)); });
}
Status release_pinned(void* memory) {
  return guarded([&] { HQQ_CUDA_CHECK(cudaFreeHost(memory)); });
}

Status copy(void* to, const void* from, std::size_t bytes, StreamHandle stream) {
  return guarded([&] {
    HQQ_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, as_stream(stream)));
  });
}

Status create_stream(StreamHandle* out) {
  return guarded([&] {
    cudaStream_t stream = nullptr;
    HQQ_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    *out = stream;
  });
}
Status destroy_stream(StreamHandle stream) {
  return guarded([&] { HQQ_CUDA_CHECK(cudaStreamDestroy(as_stream(stream))); });
}
Status synchronize(StreamHandle stream) {
  return guarded([&] { HQQ_CUDA_CHECK(cudaStreamSynchronize(as_stream(stream))); });
}

Status run_quantize_workspace_bytes(const QuantizeArgs& args, std::size_t* out) {
  return guarded([&] { *out = quantize_workspace_bytes(args); });
}
Status run_quantize(const QuantizeArgs& args, StreamHandle stream) {
  return guarded([&] { quantize(args, stream); });
}
Status run_dequantize(const DeviceMatrix& q, void* out, DType type, StreamHandle stream) {
  return guarded([&] { dequantize(q, out, type, stream); });
}
Status run_dequantize_rows(const DeviceMatrix& q, const std::int64_t* ids, std::int64_t count,
                           void* out, DType type, StreamHandle stream) {
  return guarded([&] { dequantize_rows(q, ids, count, out, type, stream); });
}

Status run_tiles_bytes(const DeviceMatrix& q, std::size_t* out) {
  return guarded([&] { *out = tiles_bytes(q); });
}
Status run_pack(const DeviceMatrix& format1, void* tiles, StreamHandle stream) {
  return guarded([&] { pack(format1, tiles, stream); });
}
Status run_unpack(const DeviceMatrix& tiles, std::uint8_t* W_q, std::int64_t row_bytes,
                  StreamHandle stream) {
  return guarded([&] { unpack(tiles, W_q, row_bytes, stream); });
}
Status run_max_rows(const DeviceMatrix& q, DType x_type, std::int64_t* out) {
  return guarded([&] { *out = max_rows(q, x_type); });
}
Status run_linear_workspace_bytes(const LinearArgs& args, std::size_t* out) {
  return guarded([&] { *out = linear_workspace_bytes(args); });
}
Status run_linear(const LinearArgs& args, StreamHandle stream) {
  return guarded([&] { linear(args, stream); });
}

Status is_capturing(StreamHandle stream, bool* out) {
  return guarded([&] {
    *out = false;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaError_t error = cudaStreamIsCapturing(as_stream(stream), &status);
    if (error == cudaErrorStreamCaptureImplicit) {
      // The default stream, which cannot be captured itself, while another one is.
      cudaGetLastError();
      return;
    }
    HQQ_CUDA_CHECK(error);
    *out = status != cudaStreamCaptureStatusNone;
  });
}

constexpr Api kApi{
    kApiVersion,   HQQ_CUDA_MIN_COMPUTE, error_text,          driver_info,
    device_count,  device_info,          set_device,          allocate,
    release,       allocate_pinned,      release_pinned,      copy,
    create_stream, destroy_stream,       synchronize,         run_quantize_workspace_bytes,
    run_quantize,  run_dequantize,       run_dequantize_rows, run_tiles_bytes,
    run_pack,      run_unpack,           run_max_rows,        run_linear_workspace_bytes,
    run_linear,    is_capturing};

}  // namespace
}  // namespace hqq::cuda

extern "C" __attribute__((visibility("default"))) const hqq::cuda::Api* hqq_cuda_api() {
  return &hqq::cuda::kApi;
}

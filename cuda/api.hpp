// What the shared library libhqq_cuda offers: one table of functions, plain structs, device
// pointers and streams. src/cuda loads it on first use. No exception crosses this border, and the
// library links nothing of hqq: it uses headers alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "hqq/bitpack.hpp"
#include "hqq/core/group.hpp"
#include "hqq/core/params.hpp"
#include "hqq/dtype.hpp"

namespace hqq::cuda {

// Changes with every change of this file: a library of another build is refused.
inline constexpr int kApiVersion = 6;

// A cudaStream_t; null: the default stream of the current device.
using StreamHandle = void*;

enum class Status : int {
  kOk,
  kCudaError,    // a CUDA call failed
  kOutOfMemory,  // of the device, or of pinned host memory
  kUnsupported,  // no kernel does this: the caller takes another way
  kInvalidCall,  // arguments that contradict each other: a mistake of the caller
};

struct DeviceInfo {
  char name[256];
  int compute_major, compute_minor;
  int multiprocessors;
  std::size_t total_memory;  // bytes
};

struct DriverInfo {
  int driver_version, runtime_version;  // as 13000 for 13.0; driver 0: none is installed
};

// The order of the codes of a matrix. Scale, zero and col_scale stay as format 1 has them.
enum class Packing : int {
  kFormat1,    // packed rows (docs/format.md)
  kCudaTiles,  // what the linear kernels read (docs/cuda-kernels.md), written by pack()
};

// A quantized matrix whose tensors are in device memory, rows contiguous.
struct DeviceMatrix {
  core::GroupLayout layout;  // rows = out_features, cols = in_features
  BitWidth width = BitWidth::k4;
  Packing packing = Packing::kFormat1;
  std::uint8_t* W_q = nullptr;     // [rows, row_bytes]; kCudaTiles: tiles_bytes(), aligned to 16
  std::int64_t row_bytes = 0;      // of kFormat1
  DType scale_type = DType::kF16;  // kF16, kBF16, kF32, or kU8 with step and offset
  DType zero_type = DType::kF16;
  void* scale = nullptr;  // [num_groups]
  void* zero = nullptr;
  float* scale_step = nullptr;  // [metadata blocks]
  float* scale_offset = nullptr;
  float* zero_step = nullptr;
  float* zero_offset = nullptr;
  DType col_scale_type = DType::kF16;
  void* col_scale = nullptr;  // [cols], or null
};

enum class SolverKind : int { kMinMax, kJoint, kHqq };

// What kernels found wrong, in device memory; the caller writes kNoProblem before and reads it
// after.
struct QuantizeProblems {
  std::uint64_t nonfinite;        // weights that are NaN or Inf as float32
  std::uint64_t first_nonfinite;  // row * cols + column of the first, ~0: none
  std::uint64_t first_overflow;   // first group whose stored scale or zero is not finite, ~0: none
  std::uint64_t first_small;  // first group whose stored scale is not above small_scale, ~0: none
};
inline constexpr QuantizeProblems kNoProblem{0, ~std::uint64_t{0}, ~std::uint64_t{0},
                                             ~std::uint64_t{0}};

struct QuantizeArgs {
  const void* W = nullptr;  // [rows, cols], kF32, kF16, kBF16 or kF64
  DType W_type = DType::kF32;
  std::int64_t row_stride = 0;  // elements
  const float* importance =
      nullptr;  // [cols] relative to its mean and at least kMinImportance, or null
  SolverKind solver = SolverKind::kJoint;
  core::SolverParams params;
  const core::Shrinkage* shrinkages = nullptr;  // host, of every step of kHqq: hqq_shrinkages()
  float small_scale = 0.0f;                     // stored scales up to this are reported
  bool balance = false;                         // sinkhorn: fills out.col_scale first
  DeviceMatrix out;
  QuantizeProblems* problems = nullptr;
  core::ErrorSums* errors = nullptr;  // or null: not wanted
  void* workspace = nullptr;          // of workspace_bytes(), aligned to 256
  std::size_t workspace_bytes = 0;
};

// Bytes between the tensors of one expert and those of the next. A stack [experts, ...] of format-1
// tensors has the bytes of one expert here; a tensor that is absent has any.
struct ExpertStrides {
  std::int64_t W_q = 0;
  std::int64_t scale = 0, zero = 0;
  std::int64_t scale_step = 0, scale_offset = 0;
  std::int64_t zero_step = 0, zero_offset = 0;
  std::int64_t col_scale = 0;
};

// y[r] = x[r] W_e^T + bias_e for the rows r in [row_begin[e], row_begin[e + 1]) of every expert e.
// A plain layer is one expert and has row_begin null: all rows.
struct LinearArgs {
  DeviceMatrix weight;  // of expert 0, kCudaTiles
  std::int64_t experts = 1;
  ExpertStrides strides;
  const std::int64_t* row_begin = nullptr;  // device memory, [experts + 1], or null
  DType x_type = DType::kF16;               // kF16 or kBF16: of x, bias and y
  const void* x = nullptr;                  // [rows, cols]
  std::int64_t rows = 0;
  std::int64_t x_stride = 0;   // elements
  const void* bias = nullptr;  // [experts, out_features], or null
  void* y = nullptr;           // [rows, out_features]
  std::int64_t y_stride = 0;
  void* workspace = nullptr;  // of linear_workspace_bytes(), aligned to 256; its first
                              // kCounterBytes are 0 before the first call and after each
  std::size_t workspace_bytes = 0;
};

struct Api {
  int version;
  int min_compute;  // of the GPUs that it has kernels for, as 80
  // What went wrong in the last call of this thread that did not return kOk: file, line, call,
  // text.
  const char* (*error_text)();

  Status (*driver_info)(DriverInfo* out);
  Status (*device_count)(int* out);
  Status (*device_info)(int device, DeviceInfo* out);

  // Every function below works on the device that is current in its thread; this makes one current
  // and says which was.
  Status (*set_device)(int device, int* previous);
  Status (*allocate)(std::size_t bytes, void** out);
  Status (*release)(void* memory);
  Status (*allocate_pinned)(std::size_t bytes, void** out);
  Status (*release_pinned)(void* memory);
  // In any direction; asynchronous where the host memory is pinned.
  Status (*copy)(void* to, const void* from, std::size_t bytes, StreamHandle stream);
  Status (*create_stream)(StreamHandle* out);
  Status (*destroy_stream)(StreamHandle stream);
  Status (*synchronize)(StreamHandle stream);

  Status (*quantize_workspace_bytes)(const QuantizeArgs& args, std::size_t* out);
  Status (*quantize)(const QuantizeArgs& args, StreamHandle stream);

  // W_r as kF32, kF16, kBF16 or kF64 to out [rows, cols], from either packing.
  Status (*dequantize)(const DeviceMatrix& q, void* out, DType type, StreamHandle stream);
  // Rows `ids` [count] (device memory, each in [0, rows)) to out [count, cols]: an embedding.
  Status (*dequantize_rows)(const DeviceMatrix& q, const std::int64_t* ids, std::int64_t count,
                            void* out, DType type, StreamHandle stream);

  // Size of the codes as kCudaTiles. kUnsupported where no linear kernel of the current device has
  // this layout. Pointers of q are not read.
  Status (*tiles_bytes)(const DeviceMatrix& q, std::size_t* out);
  // Codes of a matrix in kFormat1 to `tiles`, aligned to 16. The metadata is not read.
  Status (*pack)(const DeviceMatrix& format1, void* tiles, StreamHandle stream);
  // The inverse, bit for bit: codes of a matrix in kCudaTiles to W_q [rows, row_bytes].
  Status (*unpack)(const DeviceMatrix& tiles, std::uint8_t* W_q, std::int64_t row_bytes,
                   StreamHandle stream);

  // Largest number of rows of x (for one expert, on average) for which linear() is the faster way;
  // beyond, dequantize() and a dense product are. kUnsupported as for linear(). Pointers of q are
  // not read.
  Status (*max_rows)(const DeviceMatrix& q, DType x_type, std::int64_t* out);
  // Addresses are not read, but row_begin says whether there are experts. kUnsupported as for
  // linear().
  Status (*linear_workspace_bytes)(const LinearArgs& args, std::size_t* out);
  // kUnsupported where no kernel of the current device has this layout or x_type.
  Status (*linear)(const LinearArgs& args, StreamHandle stream);

  // Whether work that is given to the stream is recorded to a graph instead of being run.
  Status (*is_capturing)(StreamHandle stream, bool* out);
};

inline constexpr std::size_t kCounterBytes = 64 * 1024;

}  // namespace hqq::cuda

// The one symbol that the library exports.
extern "C" const hqq::cuda::Api* hqq_cuda_api();

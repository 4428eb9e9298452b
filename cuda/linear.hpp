// y = x W_r^T from packed codes on tensor cores (docs/cuda-kernels.md). Errors are thrown as
// Failure.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/choose.hpp"
#include "cuda/runtime.hpp"

namespace hqq::cuda {

// Whether there are fused kernels for this layout and type of x on the current device.
bool fused_supported(const DeviceMatrix& q, DType x_type);
bool fused_supported(const DeviceMatrix& q, DType x_type, const DeviceTraits& device);

FusedSizes fused_sizes(const DeviceMatrix& q, DType x_type);

// Writes fused_sizes() bytes to `codes` and `metadata`, both aligned to 16.
void repack(const DeviceMatrix& q, DType x_type, void* codes, void* metadata, StreamHandle stream);

std::int64_t fused_max_rows(const FusedMatrix& weight);

std::size_t linear_workspace_bytes(const FusedLinearArgs& args);

void linear(const FusedLinearArgs& args, StreamHandle stream);

// With a plan other than choose_linear()'s: for tests and tuning.
std::size_t linear_workspace_bytes(const FusedLinearArgs& args, const LinearPlan& plan);
void linear(const FusedLinearArgs& args, const LinearPlan& plan, StreamHandle stream);

}  // namespace hqq::cuda

// y = x W_r^T from packed codes on tensor cores (docs/cuda-kernels.md). Errors are thrown as
// Failure.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/linear/choose.hpp"
#include "cuda/runtime.hpp"

namespace hqq::cuda {

std::int64_t max_rows(const DeviceMatrix& q, DType x_type);

std::size_t linear_workspace_bytes(const LinearArgs& args);

void linear(const LinearArgs& args, StreamHandle stream);

// With a plan other than choose_linear()'s: for tests and tuning.
std::size_t linear_workspace_bytes(const LinearArgs& args, const LinearPlan& plan);
void linear(const LinearArgs& args, const LinearPlan& plan, StreamHandle stream);

}  // namespace hqq::cuda

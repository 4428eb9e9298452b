// Quantization of a matrix that is in device memory.
#pragma once

#include <string>

#include "cuda/api.hpp"
#include "hqq/quantized_tensor.hpp"
#include "hqq/quantizer.hpp"

namespace hqq::cuda {

struct DeviceTask {
  TensorView W;  // in device memory
  LayerConfig config;
  const float* importance = nullptr;  // device memory [cols]: relative_importance(), or null
  DeviceMatrix out;
  std::string name;                // for messages
  QuantizeStats* stats = nullptr;  // or null: not wanted
};

// Device memory that solve() needs beside W and the result.
std::size_t solve_workspace_bytes(const DeviceTask& task);

// Fills task.out on the current device and waits for it. Throws as cpu::quantize does, and
// CudaError. `workspace` is aligned to 256.
void solve(const DeviceTask& task, void* workspace, std::size_t workspace_bytes,
           StreamHandle stream);

}  // namespace hqq::cuda

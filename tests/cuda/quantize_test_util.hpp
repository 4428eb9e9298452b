// Quantizing on the shim and on the CPU.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/quantize.hpp"
#include "hqq/quantizer.hpp"
#include "src/format/float_values.hpp"
#include "src/quantize/small_scales.hpp"
#include "src/quantize/solve_params.hpp"
#include "tests/cuda/device_memory.hpp"

namespace hqq::cuda_testing {

using cuda::DeviceArray;
using cuda::DeviceCopy;

struct Case {
  LayerConfig config;
  DType dtype = DType::kF32;
  std::int64_t rows = 0, cols = 0;
  std::int64_t padding = 0;  // row_stride - cols
  std::vector<float> importance = {};
};

struct Result {
  QuantizedTensor q;
  cuda::QuantizeProblems problems;
  core::ErrorSums errors;
};

inline std::vector<float> gaussian(std::int64_t count, unsigned seed = 1) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& v : values) v = normal(rng);
  return values;
}

// Columns and rows of unlike size, so that balancing has work to do.
inline std::vector<float> uneven(std::int64_t rows, std::int64_t cols) {
  std::vector<float> W = gaussian(rows * cols);
  for (std::int64_t i = 0; i < rows * cols; ++i) {
    W[static_cast<std::size_t>(i)] *=
        static_cast<float>(1 + i % cols % 5) * 0.1f + static_cast<float>(i / cols % 3) * 0.2f;
  }
  return W;
}

inline std::vector<std::byte> stored(const std::vector<float>& W, const Case& c) {
  const std::int64_t stride = c.cols + c.padding;
  std::vector<float> padded(static_cast<std::size_t>(c.rows * stride), 1e30f);
  for (std::int64_t r = 0; r < c.rows; ++r) {
    std::copy_n(W.begin() + r * c.cols, c.cols, padded.begin() + r * stride);
  }
  std::vector<std::byte> bytes(padded.size() * dtype_size(c.dtype));
  write_values(padded, c.dtype, bytes.data());
  return bytes;
}

inline std::vector<std::pair<std::string, Tensor*>> present(QuantizedTensor& q) {
  std::vector<std::pair<std::string, Tensor*>> tensors;
  for (auto& [name, tensor] : q.fields()) {
    if (*tensor) tensors.emplace_back(name, tensor);
  }
  return tensors;
}

inline cuda::SolverKind kind_of(Solver solver) {
  if (solver == Solver::kMinMax) return cuda::SolverKind::kMinMax;
  return solver == Solver::kJoint ? cuda::SolverKind::kJoint : cuda::SolverKind::kHqq;
}

inline Result on_gpu(const std::vector<std::byte>& bytes, const Case& c) {
  Result result;
  QuantizedTensor& q = result.q;
  q.config = c.config;
  q.out_features = c.rows;
  q.in_features = c.cols;
  q.allocate();
  // What a kernel leaves out shows.
  for (auto& [name, tensor] : present(q))
    std::memset(tensor->buffer.data, 0xA5, tensor->buffer.size);

  const DeviceArray<std::byte> W(bytes);
  const DeviceArray<float> importance(c.importance.empty() ? std::vector<float>()
                                                           : relative_importance(c.importance));
  const DeviceArray<cuda::QuantizeProblems> problems(std::vector{cuda::kNoProblem});
  const DeviceArray<core::ErrorSums> errors(1);
  const DeviceCopy out(q);
  cuda::QuantizeArgs args;
  args.W = W.data();
  args.W_type = c.dtype;
  args.row_stride = c.cols + c.padding;
  args.importance = c.importance.empty() ? nullptr : importance.data();
  args.solver = kind_of(c.config.solver);
  args.params = solver_params(c.config);
  const std::vector<core::Shrinkage> shrinkages = hqq_shrinkages(c.config);
  args.shrinkages = shrinkages.data();
  args.small_scale = small_scale(c.config);
  args.balance = c.config.balance == Balance::kSinkhorn;
  args.out = out.matrix();
  args.problems = problems.data();
  args.errors = errors.data();
  const DeviceArray<std::byte> workspace(cuda::quantize_workspace_bytes(args));
  args.workspace = workspace.data();
  args.workspace_bytes = workspace.size();
  cuda::quantize(args, nullptr);

  const auto copy_back = [](const void* from, Tensor& to) {
    if (to) std::memcpy(to.buffer.data, from, to.buffer.size);
  };
  copy_back(args.out.W_q, q.W_q);
  copy_back(args.out.scale, q.scale);
  copy_back(args.out.zero, q.zero);
  copy_back(args.out.scale_step, q.scale_step);
  copy_back(args.out.scale_offset, q.scale_offset);
  copy_back(args.out.zero_step, q.zero_step);
  copy_back(args.out.zero_offset, q.zero_offset);
  copy_back(args.out.col_scale, q.col_scale);
  result.problems = problems[0];
  result.errors = errors[0];
  return result;
}

inline QuantizedTensor on_cpu(const std::vector<std::byte>& bytes, const Case& c,
                              QuantizeStats* stats) {
  const TensorView W(bytes.data(), c.dtype, c.rows, c.cols, c.cols + c.padding);
  QuantizeOptions options;
  options.importance = c.importance;
  options.threads = 1;
  options.stats = stats;
  return Quantizer().quantize(W, c.config, "", options);
}

inline LayerConfig config_of(BitWidth nbits, Solver solver, std::optional<std::int64_t> group_size,
                             int axis) {
  LayerConfig config;
  config.nbits = nbits;
  config.solver = solver;
  config.group_size = group_size;
  config.axis = axis;
  config.balance = Balance::kNone;
  return config;
}

inline std::vector<float> column_importance(std::int64_t cols) {
  std::vector<float> importance(static_cast<std::size_t>(cols));
  for (std::int64_t c = 0; c < cols; ++c) {
    importance[static_cast<std::size_t>(c)] = static_cast<float>(c * c % 17);
  }
  return importance;
}

}  // namespace hqq::cuda_testing

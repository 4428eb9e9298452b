// The cases of hqq-bench. A case is named after what it measures, from the operation to the shape
// of the matrix: linear/cpu/4bit/axis1/fast/rows1/4096x4096. --benchmark_filter selects by these
// names.
#pragma once

#include <benchmark/benchmark.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "hqq/device.hpp"
#include "hqq/quantized_tensor.hpp"

namespace hqq::bench {

// Rows and columns of the square matrices. One fits into caches; one is larger than all of them.
inline constexpr std::int64_t kSizes[] = {1024, 4096, 8192};

// The CPU, and the first GPU if there is one that can be used.
std::vector<Device> devices();

// "linear/cpu/4bit/axis1", then "/" and each of `details`, then "/4096x4096".
std::string case_name(const std::string& operation, const Device& device, const LayerConfig& config,
                      const std::vector<std::string>& details, std::int64_t size);

// Adds a case whose time is wall time in milliseconds.
void add_case(const std::string& name, std::function<void(benchmark::State&)> run);

// Calls `visit` with every bit width and axis, in groups of 64 without balance, solved by min/max.
void for_each_layout(const std::function<void(const LayerConfig&)>& visit);

// Weights and packed bytes (codes, scales and zeros) that an iteration goes through, as rates.
void set_rates(benchmark::State& state, std::int64_t weights, std::int64_t packed_bytes);
// Those of `q`, once.
void set_rates(benchmark::State& state, const PackedMatrix& q);

void add_quantize_cases();
void add_dequantize_cases();
void add_linear_cases();
void add_gpu_cases();  // where there is a GPU

}  // namespace hqq::bench

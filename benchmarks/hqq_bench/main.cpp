// hqq-bench: times of quantize, dequantize and linear with every bit width (benchmarks/README.md).
#include <benchmark/benchmark.h>

#include <exception>
#include <iostream>
#include <string>

#include "benchmarks/hqq_bench/cases.hpp"
#include "hqq/device.hpp"
#include "hqq/version.hpp"
#include "src/cpu/dispatch.hpp"

namespace {

constexpr int kUsageError = 2;

int run(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (argc > 1) {
    std::cerr << "hqq-bench: unknown argument '" << argv[1]
              << "'; hqq-bench --help lists the flags\n";
    return kUsageError;
  }
  benchmark::AddCustomContext("hqq.cpp", HQQ_VERSION_STRING);
  benchmark::AddCustomContext("cpu_target", hqq::cpu::current_target());
  benchmark::AddCustomContext("threads", std::to_string(hqq::default_threads()));
  hqq::bench::add_quantize_cases();
  hqq::bench::add_dequantize_cases();
  hqq::bench::add_linear_cases();
  hqq::bench::add_gpu_cases();
  // A filter that fits nothing has been reported by the time this returns 0.
  return benchmark::RunSpecifiedBenchmarks() > 0 ? 0 : kUsageError;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "hqq-bench: " << error.what() << "\n";
    return kUsageError;
  }
}

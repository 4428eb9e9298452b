// Rates of the CPU kernels on every target of this machine, one thread: bench_kernels
// [--benchmark_filter=...]
#include <benchmark/benchmark.h>

#include <random>

#include "hqq/quantizer.hpp"
#include "src/cpu/dispatch.hpp"

namespace {

const hqq::RowMajorMatrix& weights() {
  static const hqq::RowMajorMatrix W = [] {
    std::mt19937 rng(0);
    std::normal_distribution<float> normal;
    hqq::RowMajorMatrix matrix(1024, 4096);
    for (Eigen::Index i = 0; i < matrix.size(); ++i) matrix.data()[i] = normal(rng);
    return matrix;
  }();
  return W;
}

void set_rate(benchmark::State& state) {
  state.counters["weights/s"] = benchmark::Counter(static_cast<double>(weights().size()),
                                                   benchmark::Counter::kIsIterationInvariantRate);
}

void quantize(benchmark::State& state, const std::string& target, const hqq::LayerConfig& config) {
  hqq::cpu::set_target(target);
  const hqq::Quantizer quantizer{hqq::HqqConfig(config)};
  hqq::QuantizeOptions options;
  options.threads = 1;
  for (auto _ : state) {
    benchmark::DoNotOptimize(quantizer.quantize(weights(), "", options).W_q.buffer.data);
  }
  set_rate(state);
}

void dequantize(benchmark::State& state, const std::string& target,
                const hqq::LayerConfig& config) {
  hqq::cpu::set_target(target);
  const hqq::QuantizedTensor q = hqq::Quantizer(hqq::HqqConfig(config)).quantize(weights());
  for (auto _ : state) {
    benchmark::DoNotOptimize(hqq::dequantize(q, hqq::DType::kF32, 1).buffer.data);
  }
  set_rate(state);
}

void register_all() {
  for (const std::string& target : hqq::cpu::supported_targets()) {
    for (hqq::BitWidth nbits : hqq::kAllBitWidths) {
      for (hqq::Solver solver : {hqq::Solver::kMinMax, hqq::Solver::kHqq, hqq::Solver::kJoint}) {
        hqq::LayerConfig config;
        config.nbits = nbits;
        config.solver = solver;
        config.balance = hqq::Balance::kNone;
        const std::string bits = std::to_string(hqq::nbits_of(nbits)).substr(0, 4);
        benchmark::RegisterBenchmark(
            ("quantize/" + hqq::to_string(solver) + "/" + bits + "/" + target).c_str(), quantize,
            target, config);
        if (solver == hqq::Solver::kJoint) {
          benchmark::RegisterBenchmark(("dequantize/" + bits + "/" + target).c_str(), dequantize,
                                       target, config);
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  register_all();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

// Every solver, on every device. On a GPU the time includes the copies to it and back.
#include "benchmarks/hqq_bench/cases.hpp"
#include "benchmarks/hqq_bench/weights.hpp"
#include "hqq/quantizer.hpp"

namespace hqq::bench {
namespace {

void quantize(benchmark::State& state, const Quantizer& quantizer, std::int64_t size) {
  const TensorView W(dense_weights(size));
  QuantizedTensor q;
  for (auto _ : state) {
    q = quantizer.quantize(W);
    benchmark::DoNotOptimize(q.W_q.buffer.data);
  }
  set_rates(state, q);
}

}  // namespace

void add_quantize_cases() {
  for (const Device& device : devices()) {
    for (const std::int64_t size : kSizes) {
      for_each_layout([&](LayerConfig config) {
        for (const Solver solver : {Solver::kMinMax, Solver::kHqq, Solver::kJoint}) {
          config.solver = solver;
          const Quantizer quantizer(HqqConfig(config), device);
          add_case(case_name("quantize", device, config, {to_string(solver)}, size),
                   [=](benchmark::State& state) { quantize(state, quantizer, size); });
        }
      });
    }
  }
}

}  // namespace hqq::bench

// From format 1 to a matrix in memory of the caller.
#include "benchmarks/hqq_bench/cases.hpp"
#include "benchmarks/hqq_bench/weights.hpp"
#include "hqq/quantizer.hpp"

namespace hqq::bench {
namespace {

void dequantize(benchmark::State& state, const LayerConfig& config, DType dtype,
                std::int64_t size) {
  const QuantizedTensor& q = quantized_weights(config, size);
  Tensor W_r = Tensor::allocate(dtype, {size, size});
  for (auto _ : state) {
    hqq::dequantize(q, W_r.buffer.data, {dtype});
    benchmark::ClobberMemory();
  }
  set_rates(state, q);
}

}  // namespace

void add_dequantize_cases() {
  for (const std::int64_t size : kSizes) {
    for_each_layout([&](const LayerConfig& config) {
      for (const DType dtype : {DType::kF32, DType::kBF16}) {
        add_case(
            case_name("dequantize", Device::cpu(), config, {std::string(dtype_name(dtype))}, size),
            [=](benchmark::State& state) { dequantize(state, config, dtype, size); });
      }
    });
  }
}

}  // namespace hqq::bench

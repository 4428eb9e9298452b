// Products with float32 rows, as a model computes them: weights in tiles, each product with others
// than the one before.
#include "hqq/linear.hpp"

#include "benchmarks/hqq_bench/cases.hpp"
#include "benchmarks/hqq_bench/weights.hpp"

namespace hqq::bench {
namespace {

// Decoding, a batch, and a prompt.
constexpr std::int64_t kRows[] = {1, 64, 512};

void linear(benchmark::State& state, const LayerConfig& config, LinearMode mode, std::int64_t rows,
            std::int64_t size) {
  const std::vector<TiledTensor>& copies = tiled_copies(config, size);
  const TensorView x(dense_weights(size).buffer.data, DType::kF32, rows, size);
  Tensor y = Tensor::allocate(DType::kF32, {rows, size});
  LinearOptions options;
  options.mode = mode;
  std::size_t next = 0;
  for (auto _ : state) {
    hqq::linear(x, copies[next], {}, y.buffer.data, options);
    benchmark::ClobberMemory();
    next = (next + 1) % copies.size();
  }
  set_rates(state, copies[0]);
  state.counters["operations/s"] = benchmark::Counter(
      2.0 * static_cast<double>(rows * size * size), benchmark::Counter::kIsIterationInvariantRate);
}

}  // namespace

void add_linear_cases() {
  for (const std::int64_t size : kSizes) {
    for_each_layout([&](const LayerConfig& config) {
      for (const LinearMode mode : {LinearMode::kFast, LinearMode::kExact}) {
        for (const std::int64_t rows : kRows) {
          const std::string rows_name = "rows" + std::to_string(rows);
          add_case(case_name("linear", Device::cpu(), config, {to_string(mode), rows_name}, size),
                   [=](benchmark::State& state) { linear(state, config, mode, rows, size); });
        }
      }
    });
  }
}

}  // namespace hqq::bench

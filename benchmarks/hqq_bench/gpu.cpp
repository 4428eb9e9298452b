// Products and dequantizing on a GPU, from its memory. An iteration is one call for each of many
// copies of the weight, which fill no cache, and a wait for the last.
#include "benchmarks/hqq_bench/cases.hpp"
#include "benchmarks/hqq_bench/weights.hpp"
#include "hqq/linear.hpp"
#include "src/cuda/handles.hpp"

namespace hqq::bench {
namespace {

// Decoding, a batch, and the most that is not left to a dense product.
constexpr std::int64_t kRows[] = {1, 16, 128};
constexpr std::size_t kHalfBytes = 2;

// Calls run(layer) for every layer in each iteration.
template <class Run>
void measure(benchmark::State& state, const std::vector<Linear>& layers, const Run& run) {
  const cuda::Api& api = cuda::library();
  for (auto _ : state) {
    for (const Linear& layer : layers) run(layer);
    cuda::check(api.synchronize(nullptr), "hqq-bench");
  }
  const Linear& layer = layers.front();
  set_rates(state, std::ssize(layers) * layer.out_features() * layer.in_features(),
            std::ssize(layers) * static_cast<std::int64_t>(layer.nbytes()));
}

void linear(benchmark::State& state, const Device& device, const LayerConfig& config,
            std::int64_t rows, std::int64_t size) {
  const std::vector<Linear>& layers = layer_copies(config, size, device);
  const cuda::CurrentDevice current(device.index);
  const std::size_t bytes = static_cast<std::size_t>(rows * size) * kHalfBytes;
  cuda::DeviceMemory x, y;
  y.reserve(bytes, "hqq-bench");
  const std::vector<std::byte> zeros(bytes);
  cuda::check(cuda::library().copy(x.reserve(bytes, "hqq-bench"), zeros.data(), bytes, nullptr),
              "hqq-bench");
  const TensorView view(x.data(), DType::kF16, rows, size);
  measure(state, layers, [&](const Linear& layer) { layer(view, y.data()); });
}

void dequantize(benchmark::State& state, const Device& device, const LayerConfig& config,
                std::int64_t size) {
  const std::vector<Linear>& layers = layer_copies(config, size, device);
  const cuda::CurrentDevice current(device.index);
  cuda::DeviceMemory out;
  out.reserve(static_cast<std::size_t>(size * size) * kHalfBytes, "hqq-bench");
  measure(state, layers, [&](const Linear& layer) { layer.dequantize(DType::kF16, out.data()); });
}

}  // namespace

void add_gpu_cases() {
  for (const Device& device : devices()) {
    if (device.kind != Device::Kind::kCuda) continue;
    for (const std::int64_t size : kSizes) {
      for_each_layout([&](const LayerConfig& config) {
        add_case(case_name("dequantize", device, config, {"float16"}, size),
                 [=](benchmark::State& state) { dequantize(state, device, config, size); });
        for (const std::int64_t rows : kRows) {
          const std::string rows_name = "rows" + std::to_string(rows);
          add_case(case_name("linear", device, config, {"float16", rows_name}, size),
                   [=](benchmark::State& state) { linear(state, device, config, rows, size); });
        }
      });
    }
  }
}

}  // namespace hqq::bench

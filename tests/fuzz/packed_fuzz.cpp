// A packed matrix with any bytes in it, as a file may give it: tiles, products and rows.
#include <fuzzer/FuzzedDataProvider.h>

#include <cstring>
#include <vector>

#include "hqq/linear.hpp"
#include "tests/fuzz/fuzz_util.hpp"

namespace {

using namespace hqq;
using fuzzing::accepted;
using fuzzing::require;

LayerConfig make_config(FuzzedDataProvider& input) {
  constexpr DType kMetadata[] = {DType::kF16, DType::kBF16, DType::kF32};
  LayerConfig config;
  config.nbits = input.PickValueInArray(kAllBitWidths);
  config.axis = input.ConsumeIntegralInRange(0, 1);
  if (const int units = input.ConsumeIntegralInRange(0, 20); units > 0) {
    config.group_size = 8 * units;
  } else {
    config.group_size.reset();
  }
  config.quant_scale = input.ConsumeBool();
  config.quant_zero = input.ConsumeBool();
  config.balance = input.ConsumeBool() ? Balance::kSinkhorn : Balance::kNone;
  config.meta_dtype = input.PickValueInArray(kMetadata);
  return config;
}

// All ones, what the input has left, or bytes that look random.
void fill(FuzzedDataProvider& input, Tensor& tensor) {
  const auto kind = input.ConsumeIntegralInRange(0, 2);
  std::memset(tensor.buffer.data, kind == 0 ? 0xFF : 0, tensor.nbytes());
  if (kind == 1) input.ConsumeData(tensor.buffer.data, tensor.nbytes());
  if (kind != 2) return;
  auto state = input.ConsumeIntegral<std::uint32_t>();
  for (std::size_t i = 0; i < tensor.nbytes(); ++i) {
    state = state * 1664525 + 1013904223;
    tensor.buffer.data[i] = static_cast<std::byte>(state >> 24);
  }
}

std::vector<float> dense(const QuantizedTensor& q) {
  std::vector<float> values(static_cast<std::size_t>(q.out_features * q.in_features));
  dequantize(q, values.data(), {DType::kF32, 1});
  return values;
}

void check_rows(FuzzedDataProvider& input, const QuantizedTensor& q) {
  const std::int64_t last = q.out_features - 1;
  const std::int64_t rows[] = {0, last, input.ConsumeIntegralInRange<std::int64_t>(-2, last + 2)};
  std::vector<float> values(static_cast<std::size_t>(3 * q.in_features));
  const bool inside = rows[2] >= 0 && rows[2] <= last;
  require(accepted([&] { dequantize_rows(q, rows, values.data()); }) == inside,
          "rows that exist are read, others are refused");
}

// Products with the tiles and with the matrix; nothing is written behind y.
void check_products(FuzzedDataProvider& input, const QuantizedTensor& q, const TiledTensor& tiles) {
  constexpr float kGuard = 77;
  const std::int64_t tokens = input.ConsumeIntegralInRange(1, 9);
  const std::size_t used = static_cast<std::size_t>(tokens * q.out_features);
  std::vector<float> x(static_cast<std::size_t>(tokens * q.in_features), 0.5f);
  std::vector<float> y(used + 4, kGuard);
  const std::size_t biases = input.ConsumeBool() ? static_cast<std::size_t>(q.out_features) : 0;
  const std::vector<float> bias(biases, 1.0f);
  LinearOptions options;
  options.threads = 1;
  options.mode = input.ConsumeBool() ? LinearMode::kFast : LinearMode::kExact;
  const TensorView view{x.data(), DType::kF32, tokens, q.in_features};
  linear(view, tiles, bias, y.data(), options);
  linear(view, q, bias, y.data(), options);
  for (std::size_t i = used; i < y.size(); ++i) require(y[i] == kGuard, "y ends where it should");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  FuzzedDataProvider input(data, size);
  QuantizedTensor q;
  q.config = make_config(input);
  q.out_features = input.ConsumeIntegralInRange(1, 70);
  q.in_features = input.ConsumeIntegralInRange(1, 200);
  const bool allocated = accepted([&] {
    q.allocate();
    for (auto& [name, tensor] : q.fields()) {
      if (tensor->nbytes() > 0) fill(input, *tensor);
    }
    q.validate("fuzz");
  });
  if (!allocated) return 0;
  const std::vector<float> expected = dense(q);
  check_rows(input, q);
  if (!can_tile(q.config, q.out_features, q.in_features)) return 0;
  const TiledTensor tiles = tile(q, {1});
  tiles.validate("fuzz");
  check_products(input, q, tiles);
  const std::vector<float> back = dense(untile(tiles, {1}));
  require(std::memcmp(expected.data(), back.data(), expected.size() * sizeof(float)) == 0,
          "tiles hold the same weights");
  return 0;
}

// One layer of upstream's state_dict in memory, right in most parts and wrong in a few.
#include <fuzzer/FuzzedDataProvider.h>

#include <cstring>
#include <limits>
#include <map>
#include <vector>

#include "src/io/formats/upstream.hpp"
#include "src/io/formats/upstream_pack.hpp"
#include "tests/fuzz/fuzz_util.hpp"

namespace {

using namespace hqq;
using fuzzing::accepted;
using fuzzing::require;
using Layer = std::map<std::string, Tensor>;

constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();

Tensor random_tensor(FuzzedDataProvider& input, DType dtype, std::vector<std::int64_t> shape) {
  Tensor tensor = Tensor::allocate(dtype, std::move(shape));
  std::memset(tensor.buffer.data, 0, tensor.nbytes());
  input.ConsumeData(tensor.buffer.data, tensor.nbytes());
  return tensor;
}

template <class Value>
Tensor scalar(DType dtype, Value value) {
  Tensor tensor = Tensor::allocate(dtype, {});
  std::memcpy(tensor.buffer.data, &value, sizeof(value));
  return tensor;
}

Tensor text_tensor(const std::string& text) {
  Tensor tensor = Tensor::allocate(DType::kU8, {static_cast<std::int64_t>(text.size())});
  std::memcpy(tensor.buffer.data, text.data(), text.size());
  return tensor;
}

Tensor shape_tensor(std::int64_t out, std::int64_t in) {
  Tensor tensor = Tensor::allocate(DType::kI64, {2});
  tensor.data<std::int64_t>()[0] = out;
  tensor.data<std::int64_t>()[1] = in;
  return tensor;
}

struct Asked {
  LayerConfig config;
  std::int64_t out, in, group_size;
};

Asked ask(FuzzedDataProvider& input) {
  constexpr std::int64_t kSizes[] = {1,     2,     3,  5,  8,       9,
                                     10,    16,    20, 24, 32,      40,
                                     64,    80,    0,  -1, 1 << 28, std::int64_t{1} << 56,
                                     kMost, -kMost};
  constexpr DType kMetadata[] = {DType::kF16, DType::kBF16, DType::kF32, DType::kF64, DType::kU8};
  Asked asked;
  asked.out = input.PickValueInArray(kSizes);
  asked.in = input.PickValueInArray(kSizes);
  const std::int64_t groups[] = {8, 16, 24,      32,    64,        80,      1,
                                 0, -8, 1 << 30, kMost, asked.out, asked.in};
  asked.group_size = input.PickValueInArray(groups);
  asked.config.balance = Balance::kNone;
  asked.config.nbits = input.PickValueInArray(kAllBitWidths);
  asked.config.axis = input.ConsumeIntegralInRange(0, 1);
  asked.config.meta_dtype = input.PickValueInArray(kMetadata);
  if (asked.group_size > 0) {
    asked.config.group_size = asked.group_size;
  } else {
    asked.config.group_size.reset();
  }
  return asked;
}

void add_settings(FuzzedDataProvider& input, const Asked& asked, Layer& layer) {
  const BitWidth nbits = asked.config.nbits;
  layer["nbits"] = nbits == BitWidth::kTernary
                       ? scalar(DType::kF32, 1.58f)
                       : scalar(DType::kI32, static_cast<std::int32_t>(nbits_of(nbits)));
  layer["packing"] = text_tensor(input.ConsumeBool() ? upstream_packing(nbits).name
                                                     : input.ConsumeRandomLengthString(10));
  layer["shape"] = shape_tensor(asked.out, asked.in);
  layer["axis"] = scalar(DType::kI32, static_cast<std::int32_t>(asked.config.axis));
  if (!input.ConsumeBool()) return;
  layer["group_size"] = input.ConsumeBool()
                            ? scalar(DType::kI32, static_cast<std::int32_t>(asked.group_size))
                            : scalar(DType::kI64, asked.group_size);
}

// What upstream would have written for such a layer, with any bytes.
void add_weights(FuzzedDataProvider& input, const Asked& asked, Layer& layer) {
  if (asked.out < 1 || asked.in < 1 || asked.out > 100 || asked.in > 100) return;
  UpstreamOptions options;
  options.view_as_float = input.ConsumeBool();
  accepted([&] {
    for (auto& [key, tensor] : upstream_layout(asked.config, asked.out, asked.in, "x", options)) {
      if (key == "W_q" || key == "scale" || key == "zero") {
        layer[key] = random_tensor(input, tensor.dtype, tensor.shape);
      } else if (input.ConsumeBool()) {
        layer[key] = tensor;
      }
    }
  });
}

// A few tensors are taken away or exchanged.
void damage(FuzzedDataProvider& input, Layer& layer) {
  std::vector<std::string> keys = upstream_keys();
  keys.insert(keys.end(), {"zero_scale", "junk"});
  constexpr DType kTypes[] = {DType::kU8,  DType::kI32,  DType::kI64, DType::kF32,
                              DType::kF16, DType::kBF16, DType::kF64, DType::kBool};
  for (int i = input.ConsumeIntegralInRange(0, 4); i > 0; --i) {
    const std::string& key = keys[input.ConsumeIntegralInRange<std::size_t>(0, keys.size() - 1)];
    if (input.ConsumeBool()) {
      layer.erase(key);
      continue;
    }
    std::vector<std::int64_t> shape(input.ConsumeIntegralInRange<std::size_t>(0, 3));
    for (std::int64_t& size : shape) size = input.ConsumeIntegralInRange(0, 40);
    layer[key] = random_tensor(input, input.PickValueInArray(kTypes), shape);
  }
}

bool same_bytes(const Tensor& a, const Tensor& b) {
  return a.nbytes() == b.nbytes() &&
         (a.nbytes() == 0 || std::memcmp(a.buffer.data, b.buffer.data, a.nbytes()) == 0);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  FuzzedDataProvider input(data, size);
  const Asked asked = ask(input);
  Layer layer;
  add_settings(input, asked, layer);
  add_weights(input, asked, layer);
  damage(input, layer);
  accepted([&] {
    const QuantizedTensor q = from_upstream(layer, "x");
    q.validate("x");
    const auto written = to_upstream(q, "x");
    const QuantizedTensor again = from_upstream(Layer(written.begin(), written.end()), "x");
    require(same_bytes(again.W_q, q.W_q), "codes survive the way to upstream and back");
    require(same_bytes(again.zero, q.zero) && same_bytes(again.scale, q.scale),
            "scale and zero do");
  });
  return 0;
}

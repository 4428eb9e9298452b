#include "benchmarks/hqq_bench/weights.hpp"

#include <cstring>
#include <optional>
#include <random>
#include <tuple>
#include <utility>

#include "hqq/quantizer.hpp"

namespace hqq::bench {
namespace {

constexpr std::int64_t kUncachedBytes = std::int64_t{128} << 20;

using WeightKey = std::pair<LayerConfig, std::int64_t>;

template <class Key, class Value>
class LastResult {
 public:
  template <class Make>
  const Value& get(const Key& key, const Make& make) {
    if (key_ != key) {
      // Two of the largest matrices need not be in memory.
      key_.reset();
      value_ = Value();
      value_ = make();
      key_ = key;
    }
    return value_;
  }

 private:
  std::optional<Key> key_;
  Value value_;
};

Tensor make_dense_weights(std::int64_t size) {
  Tensor W = Tensor::allocate(DType::kF32, {size, size});
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  for (std::int64_t i = 0; i < W.numel(); ++i) W.data<float>()[i] = normal(random);
  return W;
}

// A copy of a TiledTensor shares its memory.
TiledTensor copy_of(const TiledTensor& q) {
  TiledTensor copy = q;
  for (const auto& [name, tensor] : copy.fields()) {
    if (!*tensor) continue;
    const Buffer source = tensor->buffer;
    tensor->buffer = Buffer::allocate(source.size);
    std::memcpy(tensor->buffer.data, source.data, source.size);
  }
  return copy;
}

std::vector<TiledTensor> make_tiled_copies(const LayerConfig& config, std::int64_t size) {
  std::vector<TiledTensor> copies = {tile(quantized_weights(config, size))};
  const std::int64_t count = kUncachedBytes / copies[0].nbytes() + 1;
  while (std::ssize(copies) < count) copies.push_back(copy_of(copies[0]));
  return copies;
}

std::vector<Linear> make_layer_copies(const LayerConfig& config, std::int64_t size,
                                      const Device& device) {
  const QuantizedTensor& q = quantized_weights(config, size);
  LinearLayerOptions options;
  options.device = device;
  std::vector<Linear> copies;
  for (std::int64_t bytes = 0; bytes <= kUncachedBytes; bytes += q.nbytes()) {
    copies.emplace_back(q, options);
  }
  return copies;
}

}  // namespace

const Tensor& dense_weights(std::int64_t size) {
  static LastResult<std::int64_t, Tensor> last;
  return last.get(size, [&] { return make_dense_weights(size); });
}

const QuantizedTensor& quantized_weights(const LayerConfig& config, std::int64_t size) {
  static LastResult<WeightKey, QuantizedTensor> last;
  return last.get({config, size}, [&] {
    return Quantizer(HqqConfig(config)).quantize(TensorView(dense_weights(size)));
  });
}

const std::vector<TiledTensor>& tiled_copies(const LayerConfig& config, std::int64_t size) {
  static LastResult<WeightKey, std::vector<TiledTensor>> last;
  return last.get({config, size}, [&] { return make_tiled_copies(config, size); });
}

const std::vector<Linear>& layer_copies(const LayerConfig& config, std::int64_t size,
                                        const Device& device) {
  static LastResult<std::tuple<LayerConfig, std::int64_t, Device>, std::vector<Linear>> last;
  return last.get({config, size, device}, [&] { return make_layer_copies(config, size, device); });
}

}  // namespace hqq::bench

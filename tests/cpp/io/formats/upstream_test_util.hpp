// Layers in upstream's format, made for a test.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "hqq/bitpack.hpp"
#include "hqq/quantized_tensor.hpp"
#include "src/format/float_values.hpp"
#include "src/io/formats/upstream.hpp"

namespace hqq::testing {

using Tensors = std::map<std::string, Tensor>;

inline bool same(const Tensor& a, const Tensor& b) {
  return a.dtype == b.dtype && a.shape == b.shape && a.nbytes() == b.nbytes() &&
         std::memcmp(a.buffer.data, b.buffer.data, a.nbytes()) == 0;
}

inline Tensor copy_of(const Tensor& tensor) {
  Tensor copy = Tensor::allocate(tensor.dtype, tensor.shape);
  std::memcpy(copy.buffer.data, tensor.buffer.data, tensor.nbytes());
  return copy;
}

template <class T>
inline Tensor make(DType dtype, std::vector<std::int64_t> shape, std::vector<T> values) {
  Tensor tensor = Tensor::allocate(dtype, std::move(shape));
  EXPECT_EQ(tensor.nbytes(), values.size() * sizeof(T));
  std::memcpy(tensor.buffer.data, values.data(), tensor.nbytes());
  return tensor;
}
inline Tensor make_int(std::int32_t value) { return make<std::int32_t>(DType::kI32, {}, {value}); }
inline Tensor make_flag(std::uint8_t value) { return make<std::uint8_t>(DType::kU8, {}, {value}); }
inline Tensor make_text(const std::string& text) {
  return make<char>(DType::kU8, {static_cast<std::int64_t>(text.size())},
                    {text.begin(), text.end()});
}
inline Tensor make_shape(std::int64_t rows, std::int64_t cols) {
  return make<std::int64_t>(DType::kI64, {2}, {rows, cols});
}

inline std::vector<std::uint8_t> codes_of(const QuantizedTensor& q) {
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(q.out_features * q.in_features));
  const auto bytes = static_cast<std::size_t>(q.W_q.shape[1]);
  const auto cols = static_cast<std::size_t>(q.in_features);
  for (std::size_t row = 0; row < static_cast<std::size_t>(q.out_features); ++row) {
    unpack_row(q.config.nbits, {q.W_q.data<std::uint8_t>() + row * bytes, bytes},
               std::span(codes).subspan(row * cols, cols));
  }
  return codes;
}

// Random codes, and random finite scales and zeros of any bit pattern.
inline QuantizedTensor random_tensor(const LayerConfig& config, std::int64_t out, std::int64_t in,
                                     std::uint32_t seed) {
  std::mt19937 random(seed);
  QuantizedTensor q;
  q.config = config;
  q.config.balance = Balance::kNone;
  q.out_features = out;
  q.in_features = in;
  q.allocate();
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(in));
  for (std::int64_t row = 0; row < out; ++row) {
    for (auto& code : codes) {
      code = static_cast<std::uint8_t>(random() % (max_code(config.nbits) + 1));
    }
    const auto bytes = static_cast<std::size_t>(q.W_q.shape[1]);
    pack_row(config.nbits, codes,
             {q.W_q.data<std::uint8_t>() + static_cast<std::size_t>(row) * bytes, bytes});
  }
  for (auto& [name, tensor] : q.fields()) {
    if (name == "W_q" || !*tensor) continue;
    if (tensor->dtype == DType::kU8) {
      for (std::size_t i = 0; i < tensor->nbytes(); ++i) {
        tensor->data<std::uint8_t>()[i] = static_cast<std::uint8_t>(random());
      }
      continue;
    }
    std::vector<float> values(static_cast<std::size_t>(tensor->numel()));
    for (float& value : values) value = static_cast<float>(random() % 4001) / 1000.0f - 2.0f;
    write_values(values, tensor->dtype, tensor->buffer.data);
  }
  return q;
}

inline Tensors as_map(const std::vector<std::pair<std::string, Tensor>>& tensors) {
  return {tensors.begin(), tensors.end()};
}

// A small valid layer: 4 bits, axis 1, [8, 32], groups of 16.
inline Tensors valid_layer() {
  LayerConfig config;
  config.group_size = 16;
  return as_map(to_upstream(random_tensor(config, 8, 32, 1), "fc"));
}

}  // namespace hqq::testing

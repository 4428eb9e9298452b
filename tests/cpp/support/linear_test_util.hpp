// Quantized layers of random codes, inputs, and what linear() must make of them.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "hqq/bitpack.hpp"
#include "hqq/linear.hpp"
#include "src/cpu/dispatch.hpp"
#include "src/format/float_values.hpp"
#include "src/format/metadata.hpp"
#include "tests/cpp/support/guarded_memory.hpp"

namespace hqq::testing {

using Rng = std::mt19937;

inline std::int64_t uniform(Rng& rng, std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(rng);
}
template <class T>
T one_of(Rng& rng, std::initializer_list<T> values) {
  return values.begin()[uniform(rng, 0, static_cast<std::int64_t>(values.size()) - 1)];
}

// Puts the target back that was chosen before.
class TargetGuard {
 public:
  TargetGuard() : original_(cpu::current_target()) {}
  ~TargetGuard() { cpu::set_target(original_); }
  TargetGuard(const TargetGuard&) = delete;
  TargetGuard& operator=(const TargetGuard&) = delete;

 private:
  std::string original_;
};

struct LayerSpec {
  BitWidth nbits = BitWidth::k4;
  int axis = 1;
  std::optional<std::int64_t> group_size = 64;
  std::int64_t out_features = 0;
  std::int64_t in_features = 0;
  DType meta_dtype = DType::kF16;
  bool quant_scale = false;
  bool quant_zero = false;
  bool col_scale = false;
};

inline std::ostream& operator<<(std::ostream& out, const LayerSpec& s) {
  return out << nbits_of(s.nbits) << " bits, axis " << s.axis << ", group_size "
             << (s.group_size ? std::to_string(*s.group_size) : "None") << ", W [" << s.out_features
             << ", " << s.in_features << "], metadata " << dtype_name(s.meta_dtype)
             << (s.quant_scale ? ", 8-bit scale" : "") << (s.quant_zero ? ", 8-bit zero" : "")
             << (s.col_scale ? ", col_scale" : "");
}

inline void fill(Rng& rng, float low, float high, Tensor& tensor) {
  if (!tensor) return;
  std::uniform_real_distribution<float> value(low, high);
  std::vector<float> values(static_cast<std::size_t>(tensor.numel()));
  for (float& v : values) v = value(rng);
  write_values(values, tensor.dtype, tensor.buffer.data);
}

// Codes, scales and zeros that no solver chose: every code occurs, zeros lie outside the range of
// codes too, and some scales are negative or 0.
inline QuantizedTensor random_layer(const LayerSpec& spec, Rng& rng) {
  QuantizedTensor q;
  q.config.nbits = spec.nbits;
  q.config.axis = spec.axis;
  q.config.group_size = spec.group_size;
  q.config.meta_dtype = spec.meta_dtype;
  q.config.quant_scale = spec.quant_scale;
  q.config.quant_zero = spec.quant_zero;
  q.config.balance = spec.col_scale ? Balance::kSinkhorn : Balance::kNone;
  q.out_features = spec.out_features;
  q.in_features = spec.in_features;
  q.allocate();
  const auto row_bytes = static_cast<std::size_t>(packed_row_bytes(spec.nbits, spec.in_features));
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(spec.in_features));
  const int most = max_code(spec.nbits);
  for (std::int64_t n = 0; n < spec.out_features; ++n) {
    const std::uint32_t kind =
        rng() % 8;  // now and then a row of equal codes, which sums overflow first
    for (std::uint8_t& code : codes) {
      code = static_cast<std::uint8_t>(kind == 0 ? most : kind == 1 ? 0 : uniform(rng, 0, most));
    }
    pack_row(spec.nbits, codes,
             {q.W_q.data<std::uint8_t>() + static_cast<std::size_t>(n) * row_bytes, row_bytes});
  }
  const auto high = static_cast<float>(most);
  if (spec.quant_scale) {
    for (std::int64_t i = 0; i < q.scale.numel(); ++i) {
      q.scale.data<std::uint8_t>()[i] = static_cast<std::uint8_t>(rng());
    }
    fill(rng, 1e-4f, 1e-3f, q.scale_step);
    fill(rng, -0.02f, 0.02f, q.scale_offset);
  } else {
    fill(rng, -0.02f, 0.1f, q.scale);
    for (std::int64_t i = 7; i < q.scale.numel(); i += 13) {
      std::memset(q.scale.buffer.data + static_cast<std::size_t>(i) * dtype_size(q.scale.dtype), 0,
                  dtype_size(q.scale.dtype));
    }
  }
  if (spec.quant_zero) {
    for (std::int64_t i = 0; i < q.zero.numel(); ++i) {
      q.zero.data<std::uint8_t>()[i] = static_cast<std::uint8_t>(rng());
    }
    fill(rng, 0.001f * high, 0.005f * high, q.zero_step);
    fill(rng, -2.0f, 2.0f, q.zero_offset);
  } else {
    fill(rng, -2.0f, high + 2.0f, q.zero);
  }
  fill(rng, 0.5f, 2.0f, q.col_scale);
  return q;
}

// W_r = (q - z) * s * c in double, in its parts.
struct DenseLayer {
  explicit DenseLayer(const QuantizedTensor& layer)
      : rows(layer.out_features),
        cols(layer.in_features),
        eight_bits(layer.config.nbits == BitWidth::k8),
        layout(layer.layout()) {
    const std::vector<float> scales = read_scale(layer), zeros = read_zero(layer);
    c.assign(static_cast<std::size_t>(cols), 1.0);
    if (layer.col_scale) {
      const std::vector<float> col_scale = read_values(layer.col_scale);
      c.assign(col_scale.begin(), col_scale.end());
    }
    const auto size = static_cast<std::size_t>(rows * cols);
    q.resize(size), s.resize(size), z.resize(size);
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(cols));
    const auto row_bytes =
        static_cast<std::size_t>(packed_row_bytes(layer.config.nbits, layer.in_features));
    for (std::int64_t n = 0; n < rows; ++n) {
      unpack_row(
          layer.config.nbits,
          {layer.W_q.data<std::uint8_t>() + static_cast<std::size_t>(n) * row_bytes, row_bytes},
          codes);
      for (std::int64_t k = 0; k < cols; ++k) {
        const auto i = static_cast<std::size_t>(n * cols + k);
        const auto group = static_cast<std::size_t>(
            layout.axis == 1 ? n * layout.groups_per_row() + k / layout.group_size
                             : (n * cols + k) % layout.num_groups());
        q[i] = codes[static_cast<std::size_t>(k)];
        s[i] = scales[group];
        z[i] = zeros[group];
      }
    }
  }

  std::int64_t rows, cols;
  bool eight_bits;
  core::GroupLayout layout;
  std::vector<double> q, s, z;  // [rows, cols]
  std::vector<double> c;        // [cols]
};

// A matrix in memory that may not be touched outside its rows: NaN lies between them.
struct Matrix {
  Matrix(DType dtype, std::int64_t rows, std::int64_t cols, std::int64_t padding = 0,
         Guard guard = Guard::kAfter)
      : view(nullptr, dtype, rows, cols, cols + padding),
        size(static_cast<std::size_t>(rows == 0 ? 0 : (rows - 1) * view.row_stride + cols) *
             dtype_size(dtype)),
        memory(guarded_memory(size, guard)),
        values(static_cast<std::size_t>(rows * cols)) {
    view.data = memory.get();
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (std::size_t at = 0; at < size; at += dtype_size(dtype)) {
      write_values(std::span(&nan, 1), dtype, memory.get() + at);
    }
  }

  std::byte* at(std::int64_t m, std::int64_t k) const {
    return memory.get() +
           static_cast<std::size_t>(m * view.row_stride + k) * dtype_size(view.dtype);
  }
  double& operator()(std::int64_t m, std::int64_t k) {
    return values[static_cast<std::size_t>(m * view.cols + k)];
  }
  // Stores `values` and keeps what can be read back.
  void store() {
    for (std::int64_t m = 0; m < view.rows; ++m) {
      for (std::int64_t k = 0; k < view.cols; ++k) {
        double& value = (*this)(m, k);
        if (view.dtype == DType::kF64) {
          std::memcpy(at(m, k), &value, sizeof(value));
        } else {
          const auto narrow = static_cast<float>(value);
          write_values(std::span(&narrow, 1), view.dtype, at(m, k));
          read_values(view.dtype, at(m, k), std::span(&value, 1));
        }
      }
    }
  }

  TensorView view;
  std::size_t size;
  std::shared_ptr<std::byte> memory;
  std::vector<double> values;  // [rows, cols], exact
};

// Rows of normally distributed values, of zeros, with a large outlier, and of subnormal values.
inline void fill_rows(Rng& rng, Matrix& x) {
  std::normal_distribution<double> normal;
  const bool narrow = x.view.dtype == DType::kF16;
  const std::uint32_t first = rng();
  for (std::int64_t m = 0; m < x.view.rows; ++m) {
    const std::uint32_t kind = (first + static_cast<std::uint32_t>(m)) % 8;
    const double size = kind == 1 ? 0.0 : kind == 2 ? (narrow ? 1e-6 : 1e-40) : 1.0;
    for (std::int64_t k = 0; k < x.view.cols; ++k) x(m, k) = size * normal(rng);
    if (kind == 3) x(m, uniform(rng, 0, x.view.cols - 1)) = narrow ? 1000.0 : 1e15;
  }
  x.store();
}

}  // namespace hqq::testing

#include "src/quantize/small_scales.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "hqq/core/math.hpp"
#include "hqq/core/solver.hpp"
#include "src/cpu/parallel.hpp"
#include "src/format/float_values.hpp"
#include "src/quantize/solve_params.hpp"

namespace hqq {
namespace {

constexpr float kSmallestHalf = 0x1p-24f;
constexpr float kClippedSteps = 16.0f;
constexpr double kLargestShare = 1e-6;

struct Squares {
  double weights = 0.0, errors = 0.0;
};

std::int64_t group_of(const core::GroupLayout& layout, std::int64_t row, std::int64_t col) {
  if (layout.axis == 1) return row * layout.groups_per_row() + col / layout.group_size;
  return (row * layout.cols + col) % layout.num_groups();
}

// Squared weights of a row, and squared errors of those in groups with small scales.
Squares row_squares(const TensorView& W, const core::GroupLayout& layout, std::int64_t row,
                    float small, float max_code, const StoredMetadata& stored) {
  std::vector<float> weights(static_cast<std::size_t>(W.cols));
  const std::size_t offset = static_cast<std::size_t>(row * W.row_stride) * dtype_size(W.dtype);
  read_values(W.dtype, static_cast<const std::byte*>(W.data) + offset, weights);
  Squares squares;
  for (std::size_t c = 0; c < weights.size(); ++c) {
    const auto w = static_cast<double>(weights[c]);
    squares.weights += w * w;
    const auto g = static_cast<std::size_t>(group_of(layout, row, static_cast<std::int64_t>(c)));
    const float scale = stored.scale[g];
    if (scale > small) continue;
    const float factor = stored.col_scale.empty() ? 1.0f : stored.col_scale[c];
    const float balanced = weights[c] * (1.0f / factor);
    const float code = core::scalar::encode(balanced, 1.0f / scale, stored.zero[g], max_code);
    const double error = w - static_cast<double>((code - stored.zero[g]) * scale * factor);
    squares.errors += error * error;
  }
  return squares;
}

}  // namespace

float small_scale(const LayerConfig& config) {
  if (config.meta_dtype != DType::kF16 || config.quant_scale) return 0.0f;
  const auto top_code = static_cast<float>(max_code(config.nbits));
  return kSmallestHalf * std::max(1.0f, top_code / kClippedSteps);
}

void refuse_small_scales(const std::string& name, const TensorView& W,
                         const core::GroupLayout& layout, const LayerConfig& config,
                         const StoredMetadata& stored, int threads) {
  const float small = small_scale(config);
  const auto top_code = static_cast<float>(max_code(config.nbits));
  std::vector<Squares> rows(static_cast<std::size_t>(W.rows));
  cpu::parallel_for(W.rows, threads, [&](std::int64_t row) {
    rows[static_cast<std::size_t>(row)] = row_squares(W, layout, row, small, top_code, stored);
  });
  Squares total;
  for (const Squares& row : rows) {
    total.weights += row.weights;
    total.errors += row.errors;
  }
  if (!(total.errors > kLargestShare * total.weights)) return;
  const auto is_small = [&](float scale) { return scale <= small; };
  const auto first = std::find_if(stored.scale.begin(), stored.scale.end(), is_small);
  throw_underflow(name, layout, first - stored.scale.begin(),
                  std::count_if(first, stored.scale.end(), is_small), small);
}

}  // namespace hqq

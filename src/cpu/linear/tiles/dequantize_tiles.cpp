// W_r from tiles: all rows, or some of them.
#include "src/cpu/linear/tiles/dequantize_tiles.hpp"

#include <algorithm>

#include "hqq/bitpack.hpp"
#include "hqq/core/codec.hpp"
#include "src/cpu/linear/tiles/tile_source.hpp"
#include "src/cpu/parallel.hpp"
#include "src/format/float_values.hpp"
#include "src/format/metadata.hpp"

namespace hqq::cpu {
namespace {

// A row of axis 1 from its codes; scale and zero of its groups are `stride` apart.
void dequantize_groups(const core::GroupLayout& layout, const std::uint8_t* codes,
                       const float* scale, const float* zero, std::int64_t stride, float* row) {
  for (std::int64_t g = 0; g < layout.groups_per_row(); ++g) {
    const float s = scale[g * stride], z = zero[g * stride];
    const std::int64_t end = std::min(layout.cols, (g + 1) * layout.group_size);
    for (std::int64_t k = g * layout.group_size; k < end; ++k) row[k] = (codes[k] - z) * s;
  }
}

void scale_and_write(std::span<float> row, const std::vector<float>& col_scale, DType dtype,
                     std::byte* out) {
  for (std::size_t k = 0; k < col_scale.size(); ++k) row[k] *= col_scale[k];
  write_values(row, dtype, out);
}

struct ThreadState {
  TileSource::State tile;
  Scratch<std::uint8_t> codes;
  Scratch<float> row;
};

// Dequantizes lanes of one tile at a time.
class TileReader {
 public:
  explicit TileReader(const LinearTask& task) : source_(task), col_scale_(source_.col_scale()) {}

  const TileOrder& order() const { return source_.order(); }

  void open(std::int64_t tile) {
    operand_ = source_.tile(tile, false, state_.tile);
    codes_ = state_.codes.get(kTileRows * padded());
    unpack_codes(operand_.codes, order(), codes_);
    if (source_.layout().axis == 0) {
      const TileOperand metadata =
          source_.metadata_row(order().scale_row(tile), false, state_.tile);
      operand_.scale = metadata.scale;
      operand_.zero = metadata.zero;
    }
  }

  // The row in a lane of the open tile, [in_features] of type `dtype`.
  void read(int lane, DType dtype, std::byte* out) {
    float* row = state_.row.get(cols());
    const std::uint8_t* codes = codes_ + lane * padded();
    const core::GroupLayout& layout = source_.layout();
    if (layout.axis == 0) {
      const auto* scale = static_cast<const float*>(operand_.scale);
      const auto* zero = static_cast<const float*>(operand_.zero);
      for (std::int64_t k = 0; k < cols(); ++k) row[k] = (codes[k] - zero[k]) * scale[k];
    } else {
      dequantize_groups(layout, codes, static_cast<const float*>(operand_.scale) + lane,
                        static_cast<const float*>(operand_.zero) + lane, kTileRows, row);
    }
    scale_and_write({row, static_cast<std::size_t>(cols())}, col_scale_, dtype, out);
  }

 private:
  std::int64_t cols() const { return source_.layout().cols; }
  std::int64_t padded() const { return order().units() * kUnitCols; }

  const TileSource source_;
  const std::vector<float> col_scale_;
  ThreadState state_;
  TileOperand operand_{};
  std::uint8_t* codes_ = nullptr;
};

// Dequantizes rows of format 1 with axis 1 one by one: a tile would unpack 16 for each.
class RowReader {
 public:
  explicit RowReader(const QuantizedTensor& q)
      : q_(q),
        layout_(q.layout()),
        format_(core::row_format(q.config.nbits)),
        codes_(static_cast<std::size_t>(layout_.cols)),
        scale_(static_cast<std::size_t>(layout_.groups_per_row())),
        zero_(scale_.size()),
        row_(codes_.size()) {
    if (q.col_scale) col_scale_ = read_values(q.col_scale);
  }

  // [in_features] of type `dtype`.
  void read(std::int64_t index, DType dtype, std::byte* out) {
    core::unpack_row(format_,
                     q_.W_q.data<std::uint8_t>() + index * core::row_bytes(format_, layout_.cols),
                     layout_.cols, codes_.data());
    const std::size_t first = static_cast<std::size_t>(index) * scale_.size();
    read_metadata(q_.scale, q_.scale_step, q_.scale_offset, first, scale_);
    read_metadata(q_.zero, q_.zero_step, q_.zero_offset, first, zero_);
    dequantize_groups(layout_, codes_.data(), scale_.data(), zero_.data(), 1, row_.data());
    scale_and_write(row_, col_scale_, dtype, out);
  }

 private:
  const QuantizedTensor& q_;
  const core::GroupLayout layout_;
  const core::RowFormat format_;
  std::vector<std::uint8_t> codes_;
  std::vector<float> scale_, zero_, row_, col_scale_;
};

}  // namespace

void dequantize_tiles(const TiledTensor& q, DType dtype, std::byte* out, int threads) {
  LinearTask task;
  task.tiled = &q;
  const std::size_t row_bytes = static_cast<std::size_t>(q.in_features) * dtype_size(dtype);
  const std::int64_t tiles = TileOrder(q.config, q.layout()).tiles();
  // A reader has buffers: one for many tiles.
  constexpr std::int64_t kTilesOfUnit = 16;
  parallel_for((tiles + kTilesOfUnit - 1) / kTilesOfUnit, threads, [&](std::int64_t unit) {
    TileReader reader(task);
    const std::int64_t end = std::min(tiles, (unit + 1) * kTilesOfUnit);
    for (std::int64_t tile = unit * kTilesOfUnit; tile < end; ++tile) {
      reader.open(tile);
      for (int lane = 0; lane < kTileRows; ++lane) {
        const std::int64_t row = reader.order().row(tile, lane);
        if (row >= q.out_features) break;
        reader.read(lane, dtype, out + static_cast<std::size_t>(row) * row_bytes);
      }
    }
  });
}

void dequantize_some_rows(const LinearTask& task, std::span<const std::int64_t> rows, DType dtype,
                          std::byte* out) {
  const std::int64_t cols = task.q != nullptr ? task.q->in_features : task.tiled->in_features;
  const std::size_t row_bytes = static_cast<std::size_t>(cols) * dtype_size(dtype);
  if (task.q != nullptr && task.q->config.axis == 1) {
    RowReader reader(*task.q);
    for (std::size_t i = 0; i < rows.size(); ++i) reader.read(rows[i], dtype, out + i * row_bytes);
    return;
  }
  TileReader reader(task);
  std::int64_t open = -1;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto [tile, lane] = reader.order().position(rows[i]);
    if (tile != open) reader.open(tile);
    open = tile;
    reader.read(lane, dtype, out + i * row_bytes);
  }
}

}  // namespace hqq::cpu

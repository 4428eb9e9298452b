// W_r from tiles: all rows, or some of them.
#include "src/cpu/linear/dequantize_tiles.hpp"

#include <algorithm>

#include "src/cpu/linear/tile_source.hpp"
#include "src/cpu/parallel.hpp"
#include "src/float_values.hpp"

namespace hqq::cpu {
namespace {

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
      for (std::int64_t g = 0; g < order().groups(); ++g) {
        const float scale = static_cast<const float*>(operand_.scale)[g * kTileRows + lane];
        const float zero = static_cast<const float*>(operand_.zero)[g * kTileRows + lane];
        const std::int64_t end = std::min(cols(), (g + 1) * layout.group_size);
        for (std::int64_t k = g * layout.group_size; k < end; ++k) {
          row[k] = (codes[k] - zero) * scale;
        }
      }
    }
    for (std::size_t k = 0; k < col_scale_.size(); ++k) row[k] *= col_scale_[k];
    write_values(std::span<const float>(row, static_cast<std::size_t>(cols())), dtype, out);
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
  TileReader reader(task);
  const std::int64_t cols = task.q != nullptr ? task.q->in_features : task.tiled->in_features;
  const std::size_t row_bytes = static_cast<std::size_t>(cols) * dtype_size(dtype);
  std::int64_t open = -1;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto [tile, lane] = reader.order().position(rows[i]);
    if (tile != open) reader.open(tile);
    open = tile;
    reader.read(lane, dtype, out + i * row_bytes);
  }
}

}  // namespace hqq::cpu

// hqq::cpu::linear: prepares x, hands tiles to threads, writes y.
#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <memory>

#include "src/backend.hpp"
#include "src/cpu/linear/choose.hpp"
#include "src/cpu/linear/rows.hpp"
#include "src/cpu/linear/scratch.hpp"
#include "src/cpu/linear/tiles/column_plan.hpp"
#include "src/cpu/linear/tiles/tile_source.hpp"
#include "src/cpu/parallel.hpp"
#include "src/format/float_values.hpp"

namespace hqq::cpu {
namespace {

// Rows of x that are prepared at a time: what a panel meets stays in a second-level cache.
constexpr std::int64_t kMaxRows = 256;
// With axis 0, each thread prepares x for every row of scales.
constexpr std::int64_t kMaxRowsAxis0 = 64;
// Tiles a thread takes at a time, so that the hardware can prefetch through them.
constexpr std::int64_t kTilesOfUnit = 4;
// A thread more pays from so many bytes of codes (times rows of x) on: some microseconds of work.
constexpr std::int64_t kBytesOfThread = 1 << 15;
constexpr std::int64_t kRowsOfThread = 16;
static_assert(kMaxRows % kMaxRowsAxis0 == 0);

// Rows of x as the kernels take them.
class PreparedRows {
 public:
  void resize(std::int64_t count, const Columns& columns, bool fast) {
    const std::int64_t padded = columns.padded();
    const std::int64_t num_blocks = columns.plan().num_blocks;
    std::int8_t* codes = fast ? codes_.get(count * padded) : nullptr;
    float* values = fast ? nullptr : values_.get(count * padded);
    BlockOfX* blocks = blocks_.get(count * num_blocks);
    rows_.resize(static_cast<std::size_t>(count));
    for (std::int64_t m = 0; m < count; ++m) {
      rows_[std::size_t(m)] = {fast ? codes + m * padded : nullptr,
                               fast ? nullptr : values + m * padded, blocks + m * num_blocks};
    }
  }
  const RowOfX* data() const { return rows_.data(); }

 private:
  std::vector<RowOfX> rows_;
  Scratch<std::int8_t> codes_;
  Scratch<float> values_;
  Scratch<BlockOfX> blocks_;
};

// What a thread needs beside the operands.
struct ThreadState {
  std::array<TileSource::State, kMaxTiles> tiles;
  Scratch<float> x, y, constants;
  Scratch<std::byte> panel;
  PreparedRows rows;  // axis 0
};

ThreadState& thread_state() {
  thread_local ThreadState state;
  return state;
}

// One product, cut into units that threads may do in any order.
class Product {
 public:
  explicit Product(const LinearTask& task)
      : task_(task),
        kernels_(linear_kernels()),
        source_(task),
        columns_(std::make_unique<Columns>(source_.layout())),
        axis_(source_.layout().axis),
        fast_(task.mode == LinearMode::kFast),
        col_scale_(source_.col_scale()) {}

  std::int64_t tile_bytes() const { return source_.order().tiles() * source_.order().tile_bytes(); }

  // Takes the rows from `first` on that are done at a time; false, and nothing to do, if none begin
  // there.
  bool set_rows(std::int64_t first) {
    const std::int64_t most = axis_ == 1 ? kMaxRows : kMaxRowsAxis0;
    first_row_ = first;
    rows_ = first % most == 0 ? std::clamp<std::int64_t>(task_.x.rows - first, 0, most) : 0;
    if (rows_ == 0) return false;
    decodes_ = decode(MetaType::kF32) != nullptr;
    if (!decodes_) panels_ = columns_->panels(fast_ ? kPanelUnitsFast : kPanelUnitsExact);
    if (axis_ == 1) shared_.resize(rows_, *columns_, fast_);
    return true;
  }

  // First the rows of x, then the tiles.
  std::int64_t prepare_units() const { return axis_ == 1 ? rows_ : 0; }
  void prepare(std::int64_t m) const {
    const float* x = read_row(m, thread_state().x);
    const float* factor = col_scale_.empty() ? nullptr : col_scale_.data();
    const RowOfX& row = shared_.data()[m];
    if (fast_) {
      kernels_.quantize_x(x, factor, columns_->plan(), codes_of(row), blocks_of(row));
    } else {
      kernels_.copy_x(x, factor, columns_->plan(), decodes_, values_of(row), blocks_of(row));
    }
  }

  std::int64_t units() const {
    if (rows_ == 0) return 0;
    return (source_.order().tiles() + tiles_of_unit() - 1) / tiles_of_unit();
  }
  void run(std::int64_t unit) const {
    const std::int64_t first = unit * tiles_of_unit();
    const std::int64_t end = std::min(source_.order().tiles(), first + tiles_of_unit());
    ThreadState& state = thread_state();
    const float* constants = axis_ == 1 ? nullptr : prepare_axis0(unit, state);
    const RowOfX* rows = axis_ == 1 ? shared_.data() : state.rows.data();
    if (!decodes_) {
      for (std::int64_t tile = first; tile < end; ++tile) {
        multiply_panels(tile, rows, state);
        write_tile(tile, state.y.get(0), constants);
      }
      return;
    }
    const int step = decode_tiles(fast_, source_.order().bits(), static_cast<int>(rows_));
    for (std::int64_t tile = first; tile < end; tile += step) {
      const std::int64_t count = std::min<std::int64_t>(step, end - tile);
      decode_few(tile, count, rows, state);
      for (std::int64_t t = 0; t < count; ++t) {
        write_tile(tile + t, state.y.get(0) + t * kTileRows, constants);
      }
    }
  }

 private:
  TileKernel decode(MetaType meta) const {
    return decode_kernel(kernels_, fast_, source_.order().bits(), rows_, columns_->plan(), meta);
  }

  // Axis 0: the tiles that share a row of scales.
  std::int64_t tiles_of_unit() const {
    return axis_ == 1 ? kTilesOfUnit : source_.order().tiles_per_scale_row();
  }

  // Row m of x as float32: where it is, if it is that already.
  const float* read_row(std::int64_t m, Scratch<float>& scratch) const {
    const TensorView& x = task_.x;
    const auto offset = static_cast<std::size_t>((first_row_ + m) * x.row_stride);
    const auto* row = static_cast<const std::byte*>(x.data) + offset * dtype_size(x.dtype);
    if (x.dtype == DType::kF32) return reinterpret_cast<const float*>(row);
    float* values = scratch.get(x.cols);
    if (x.dtype == DType::kF16) {
      kernels_.read_f16(reinterpret_cast<const std::uint16_t*>(row), x.cols, values);
    } else {
      read_values(x.dtype, row, std::span(values, static_cast<std::size_t>(x.cols)));
    }
    return values;
  }

  // Kernels that multiply see the same memory as constant.
  static std::int8_t* codes_of(const RowOfX& row) { return const_cast<std::int8_t*>(row.codes); }
  static float* values_of(const RowOfX& row) { return const_cast<float*>(row.values); }
  static BlockOfX* blocks_of(const RowOfX& row) { return const_cast<BlockOfX*>(row.blocks); }

  // y_n = sum q_nk (s_k x_k) - sum z_k (s_k x_k): rows n with the same scales s and zeros z share
  // both brackets. Prepares x * s; returns the second sum of every row of x.
  const float* prepare_axis0(std::int64_t scale_row, ThreadState& state) const {
    const std::int64_t cols = source_.layout().cols;
    const bool f16 = fast_ && col_scale_.empty();
    const TileOperand metadata = source_.metadata_row(scale_row, f16, state.tiles[0]);
    if (!f16) {
      // The state's own copies.
      auto* scale = static_cast<float*>(const_cast<void*>(metadata.scale));
      auto* zero = static_cast<float*>(const_cast<void*>(metadata.zero));
      std::fill(zero + cols, zero + columns_->padded(), 0.0f);
      for (std::size_t k = 0; k < col_scale_.size(); ++k) scale[k] *= col_scale_[k];
    }
    float* constants = state.constants.get(rows_);
    state.rows.resize(rows_, *columns_, fast_);
    for (std::int64_t m = 0; m < rows_; ++m) {
      const float* x = read_row(m, state.x);
      const RowOfX& row = state.rows.data()[m];
      if (fast_) {
        constants[m] = kernels_.quantize_scaled_x(x, metadata.scale, metadata.zero, metadata.meta,
                                                  columns_->plan(), codes_of(row), blocks_of(row));
      } else {
        kernels_.copy_x(x, static_cast<const float*>(metadata.scale), columns_->plan(), decodes_,
                        values_of(row), blocks_of(row));
        constants[m] = kernels_.weighted_sum(row.values, static_cast<const float*>(metadata.zero),
                                             columns_->plan(), decodes_);
      }
    }
    return constants;
  }

  // Codes, scales and zeros of a tile.
  TileOperand operand(std::int64_t tile, bool f16, TileSource::State& state) const {
    // One group of scale 1 and zero 0, for axis 0.
    static constexpr auto kOnes = [] {
      std::array<float, kTileRows> ones{};
      ones.fill(1.0f);
      return ones;
    }();
    static constexpr std::array<float, kTileRows> kZeros{};
    TileOperand operand = source_.tile(tile, f16, state);
    if (axis_ == 0) {
      operand.scale = kOnes.data();
      operand.zero = kZeros.data();
      operand.meta = MetaType::kF32;
    }
    return operand;
  }

  // state.y [tiles][rows][16] = up to kMaxTiles tiles times few rows of x.
  void decode_few(std::int64_t tile, std::int64_t count, const RowOfX* rows,
                  ThreadState& state) const {
    RowOfX few[kMaxDecodeRows];
    for (std::int64_t m = 0; m < kMaxDecodeRows; ++m) few[m] = rows[std::min(m, rows_ - 1)];
    TileArgs args{{}, {}, {}, &columns_->plan(), few, nullptr};
    args.y = state.y.get(kMaxTiles * kMaxDecodeRows * kTileRows);
    MetaType meta{};
    for (std::int64_t t = 0; t < kMaxTiles; ++t) {
      // Where there is one tile too few, the kernel does the last one twice.
      if (t < count) {
        const TileOperand o =
            operand(tile + t, decodes_f16(fast_, rows_), state.tiles[std::size_t(t)]);
        args.codes[t] = o.codes;
        args.scale[t] = o.scale;
        args.zero[t] = o.zero;
        meta = o.meta;
      } else {
        args.codes[t] = args.codes[count - 1];
        args.scale[t] = args.scale[count - 1];
        args.zero[t] = args.zero[count - 1];
      }
    }
    decode(meta)(args);
  }

  // state.y [rows][16] = the tile times all rows of x.
  void multiply_panels(std::int64_t tile, const RowOfX* rows, ThreadState& state) const {
    const TileOperand o = operand(tile, false, state.tiles[0]);
    float* y = state.y.get(rows_ * kTileRows);
    std::fill_n(y, rows_ * kTileRows, 0.0f);
    PanelArgs args{o.codes,
                   static_cast<const float*>(o.scale),
                   static_cast<const float*>(o.zero),
                   &columns_->plan(),
                   0,
                   0,
                   rows,
                   rows_,
                   state.panel.get(kPanelScratchBytes),
                   y};
    const int index = field_packing_index(source_.order().bits());
    for (const auto& [first, end] : panels_) {
      args.first_block = first;
      args.end_block = end;
      (fast_ ? kernels_.panel_fast : kernels_.panel_exact)[index](args);
    }
  }

  std::byte* y_at(std::int64_t m, std::int64_t n) const {
    return task_.y + static_cast<std::size_t>((first_row_ + m) * task_.y_stride + n) *
                         dtype_size(task_.x.dtype);
  }

  // Adds the bias and writes y [rows][16] of a tile in the type of y.
  void write_tile(std::int64_t tile, const float* tile_y, const float* constants) const {
    if (axis_ == 0) return write_strided_tile(tile, tile_y, constants);
    const std::int64_t first = tile * kTileRows;
    const std::int64_t lanes = std::min<std::int64_t>(kTileRows, source_.layout().rows - first);
    const float* bias = task_.bias.empty() ? nullptr : task_.bias.data() + first;
    for (std::int64_t m = 0; m < rows_; ++m) {
      const float* row = tile_y + m * kTileRows;
      float values[kTileRows];
      for (std::int64_t lane = 0; lane < lanes; ++lane) {
        values[lane] = bias == nullptr ? row[lane] : row[lane] + bias[lane];
      }
      if (task_.x.dtype == DType::kF32) {
        std::memcpy(y_at(m, first), values, static_cast<std::size_t>(lanes) * sizeof(float));
      } else {
        write_values(std::span<const float>(values, static_cast<std::size_t>(lanes)), task_.x.dtype,
                     y_at(m, first));
      }
    }
  }

  // Axis 0: the rows of a tile are apart, and the zero points are still to be subtracted.
  void write_strided_tile(std::int64_t tile, const float* tile_y, const float* constants) const {
    for (int lane = 0; lane < kTileRows; ++lane) {
      const std::int64_t n = source_.order().row(tile, lane);
      const float bias = task_.bias.empty() ? 0.0f : task_.bias[static_cast<std::size_t>(n)];
      for (std::int64_t m = 0; m < rows_; ++m) {
        const float value = tile_y[m * kTileRows + lane] - constants[m] + bias;
        write_values(std::span<const float>(&value, 1), task_.x.dtype, y_at(m, n));
      }
    }
  }

  LinearTask task_;
  const LinearKernels& kernels_;
  const TileSource source_;
  const std::unique_ptr<const Columns> columns_;  // stays where it is: its plan is passed on
  const int axis_;
  const bool fast_;
  const std::vector<float> col_scale_;
  std::int64_t first_row_ = 0;
  std::int64_t rows_ = 0;
  bool decodes_ = false;
  std::vector<std::pair<std::int64_t, std::int64_t>> panels_;
  PreparedRows shared_;  // axis 1
};

}  // namespace

namespace {

bool has_tiles(const LinearTask& task) {
  return task.q == nullptr || can_tile(task.q->config, task.q->out_features, task.q->in_features);
}

// Calls work(product, unit) for all units of all products.
template <class Units, class Work>
void for_units(std::deque<Product>& products, int threads, Units units, Work work) {
  if (products.size() == 1) {
    const Product& product = products.front();
    parallel_for(units(product), threads, [&](std::int64_t unit) { work(product, unit); });
    return;
  }
  std::vector<std::int64_t> ends;
  std::int64_t total = 0;
  for (const Product& product : products) ends.push_back(total += units(product));
  parallel_for(total, threads, [&](std::int64_t unit) {
    const auto at = std::upper_bound(ends.begin(), ends.end(), unit) - ends.begin();
    const std::int64_t first = at == 0 ? 0 : ends[static_cast<std::size_t>(at - 1)];
    work(products[static_cast<std::size_t>(at)], unit - first);
  });
}

}  // namespace

void linear(std::span<const LinearTask> tasks, int threads) {
  std::deque<Product> products;
  std::int64_t rows = 0, most = 0, bytes = 0;
  for (const LinearTask& task : tasks) {
    if (task.x.rows == 0) continue;
    if (!has_tiles(task)) {
      linear_by_rows(task, threads);
      continue;
    }
    products.emplace_back(task);
    rows += task.x.rows;
    bytes += task.x.rows * products.back().tile_bytes();
    most = std::max(most, task.x.rows);
  }
  const auto threads_for = [&](std::int64_t work, std::int64_t of_thread) {
    return static_cast<int>(std::min<std::int64_t>(threads, 1 + work / of_thread));
  };
  const int prepare_threads = threads_for(rows, kRowsOfThread);
  const int run_threads = threads_for(bytes, kBytesOfThread);
  for (std::int64_t first = 0; first < most; first += kMaxRowsAxis0) {
    bool any = false;
    for (Product& product : products) any = product.set_rows(first) || any;
    if (!any) continue;
    for_units(
        products, prepare_threads, [](const Product& p) { return p.prepare_units(); },
        [](const Product& p, std::int64_t unit) { p.prepare(unit); });
    for_units(
        products, run_threads, [](const Product& p) { return p.units(); },
        [](const Product& p, std::int64_t unit) { p.run(unit); });
  }
}

}  // namespace hqq::cpu

// Column factors that balance a matrix before it is quantized (docs/solver.md, "Balance"): a block
// a tile of columns. The matrix passes through shared memory in panels of rows, once a round.
#pragma once

#include <cstdint>

#include "cuda/device/solve/store.hpp"
#include "cuda/device/solve/weights.hpp"
#include "hqq/core/balance.hpp"
#include "hqq/core/balance_row.hpp"

namespace hqq::cuda::device {

// Also the most columns that a tile has: a thread has one.
inline constexpr int kBalanceThreads = 256;

struct BalanceArgs {
  WeightSource source;  // not balanced
  std::int64_t rows = 0;
  std::int64_t tile_cols = 0;
  int panel_rows = 0;          // a multiple of kRowSlots, at most kBalanceThreads
  float* row_scale = nullptr;  // [tiles, rows]
  DType col_scale_type = DType::kF16;
  void* col_scale = nullptr;  // [cols]
};

// Shared memory of a block: offsets in floats.
struct BalanceAreas {
  std::int64_t cols, panel_rows;

  // An odd stride: neither rows nor columns of the panel share banks.
  __host__ __device__ std::int64_t stride() const { return cols | 1; }
  __host__ __device__ std::int64_t inv_scale() const { return panel_rows * stride(); }
  __host__ __device__ std::int64_t inv_factor() const { return inv_scale() + panel_rows; }
  // Sums of the columns, a slot for each row modulo kRowSlots.
  __host__ __device__ std::int64_t sum() const { return inv_factor() + cols; }
  __host__ __device__ std::int64_t square() const { return sum() + cols * core::kRowSlots; }
  __host__ __device__ std::int64_t spreads() const { return square() + cols * core::kRowSlots; }
  __host__ __device__ std::int64_t size() const { return spreads() + 4 * (kBalanceThreads / 32); }
};

class BalanceBlock {
 public:
  __device__ explicit BalanceBlock(const BalanceArgs& args)
      : args_(args),
        areas_{args.tile_cols, args.panel_rows},
        first_col_(blockIdx.x * args.tile_cols),
        thread_(static_cast<int>(threadIdx.x)),
        row_scale_(args.row_scale + blockIdx.x * args.rows),
        shared_(reinterpret_cast<float*>(simt::shared_memory())) {
    const std::int64_t rest = args.source.cols - first_col_;
    cols_ = static_cast<int>(rest < args.tile_cols ? rest : args.tile_cols);
  }

  __device__ void run() {
    if (thread_ < cols_) simt::st_shared(shared_ + areas_.inv_factor() + thread_, 1.0f);
    first_scale_ = start();
    float factor = 1.0f;
    float best = 1.0f;
    for (core::BalanceSearch search; !search.done();) {
      const core::Spread rows = sweep(search.rounds() == 0 ? Rows::kFirst : Rows::kNext);
      const float deviation = thread_ < cols_ ? column_deviation() : 0.0f;
      float columns_ratio, rows_ratio;
      ratios(deviation, rows, &columns_ratio, &rows_ratio);
      if (search.round(columns_ratio, rows_ratio)) best = factor;
      factor = core::next_factor(factor, deviation);
      if (thread_ < cols_) {
        simt::st_shared(shared_ + areas_.inv_factor() + thread_, 1.0f / factor);
      }
    }
    write(best);
  }

 private:
  enum class Rows { kPlain, kFirst, kNext };  // how a sweep scales the rows

  // Sums the columns of u / t / s, after the step of s; returns the spread of this thread's rows.
  __device__ core::Spread sweep(Rows mode) {
    for (int i = thread_; i < cols_ * core::kRowSlots; i += kBalanceThreads) {
      simt::st_shared(shared_ + areas_.sum() + i, 0.0f);
      simt::st_shared(shared_ + areas_.square() + i, 0.0f);
    }
    core::Spread spread;
    for (std::int64_t row = 0; row < args_.rows; row += args_.panel_rows) {
      const std::int64_t rest = args_.rows - row;
      const int count = static_cast<int>(rest < args_.panel_rows ? rest : args_.panel_rows);
      load_panel(row, count);
      __syncthreads();
      if (thread_ < count) step_row(row, mode, &spread);
      __syncthreads();
      add_columns(count);
      __syncthreads();
    }
    return spread;
  }

  __device__ void load_panel(std::int64_t row, int count) {
    constexpr int kWarps = kBalanceThreads / 32;
    constexpr int kAhead = 2 * kLoadsAhead;  // there is one block a multiprocessor or two
    for (int c = thread_ % 32; c < cols_; c += 32) {
      for (int first = thread_ / 32; first < count; first += kWarps * kAhead) {
        float raw[kAhead];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          const int r = first + a * kWarps;
          if (r < count) raw[a] = raw_weight(args_.source, row + r, first_col_ + c);
        }
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          const int r = first + a * kWarps;
          if (r < count) simt::st_shared(shared_ + r * areas_.stride() + c, raw[a]);
        }
      }
    }
  }

  // Row thread_ of the panel.
  __device__ void step_row(std::int64_t panel, Rows mode, core::Spread* spread) {
    float* inv_scale = shared_ + areas_.inv_scale() + thread_;
    if (mode == Rows::kPlain) return simt::st_shared(inv_scale, 1.0f);
    const float* values = shared_ + thread_ * areas_.stride();
    float sum = 0.0f;
    float square = 0.0f;
    for (int c = 0; c < cols_; ++c) {
      const float x =
          simt::ld_shared(values + c) * simt::ld_shared(shared_ + areas_.inv_factor() + c);
      sum = sum + x;
      square = square + x * x;
    }
    float* scale = row_scale_ + panel + thread_;
    const auto step = core::scalar::balance_row<float>(
        sum, square, cols_, mode == Rows::kFirst ? first_scale_ : ld_global(scale));
    st_global(scale, step.scale);
    simt::st_shared(inv_scale, step.inv_scale);
    spread->add(step.deviation);
  }

  // A thread a column and slot.
  __device__ void add_columns(int count) {
    for (int i = thread_; i < cols_ * core::kRowSlots; i += kBalanceThreads) {
      const int c = i / core::kRowSlots;
      const float inv_factor = simt::ld_shared(shared_ + areas_.inv_factor() + c);
      float sum = simt::ld_shared(shared_ + areas_.sum() + i);
      float square = simt::ld_shared(shared_ + areas_.square() + i);
      for (int r = i % core::kRowSlots; r < count; r += core::kRowSlots) {
        const float v = simt::ld_shared(shared_ + r * areas_.stride() + c) * inv_factor *
                        simt::ld_shared(shared_ + areas_.inv_scale() + r);
        sum = sum + v;
        square = square + v * v;
      }
      simt::st_shared(shared_ + areas_.sum() + i, sum);
      simt::st_shared(shared_ + areas_.square() + i, square);
    }
  }

  __device__ float slots_sum(std::int64_t area, int column) const {
    float total = 0.0f;
    for (int slot = 0; slot < core::kRowSlots; ++slot) {
      total += simt::ld_shared(shared_ + area + column * core::kRowSlots + slot);
    }
    return total;
  }

  // The deviation of column thread_.
  __device__ float column_deviation() const {
    return core::column_deviation(slots_sum(areas_.sum(), thread_),
                                  slots_sum(areas_.square(), thread_), args_.rows);
  }

  // The first s of every row.
  __device__ float start() {
    __syncthreads();
    sweep(Rows::kPlain);
    if (thread_ == 0) {
      float square = 0.0f;
      for (int c = 0; c < cols_; ++c) square += slots_sum(areas_.square(), c);
      simt::st_shared(shared_ + areas_.spreads(),
                      core::overall_deviation(square, args_.rows * cols_));
    }
    __syncthreads();
    const float scale = simt::ld_shared(shared_ + areas_.spreads());
    __syncthreads();
    return scale;
  }

  static __device__ core::Spread warp_spread(core::Spread spread) {
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const float low = __shfl_xor_sync(0xFFFFFFFFu, spread.low, lanes);
      const float high = __shfl_xor_sync(0xFFFFFFFFu, spread.high, lanes);
      spread.low = low < spread.low ? low : spread.low;
      spread.high = spread.high < high ? high : spread.high;
    }
    return spread;
  }

  // The ratios of all columns and of all rows, in every thread.
  __device__ void ratios(float deviation, const core::Spread& rows, float* columns_ratio,
                         float* rows_ratio) {
    core::Spread columns;
    columns.add(deviation);
    const core::Spread warp[2] = {warp_spread(columns), warp_spread(rows)};
    float* shared = shared_ + areas_.spreads();
    if (thread_ % 32 == 0) {
      for (int k = 0; k < 2; ++k) {
        simt::st_shared(shared + 4 * (thread_ / 32) + 2 * k, warp[k].low);
        simt::st_shared(shared + 4 * (thread_ / 32) + 2 * k + 1, warp[k].high);
      }
    }
    __syncthreads();
    float* results[2] = {columns_ratio, rows_ratio};
    for (int k = 0; k < 2; ++k) {
      core::Spread all;
      for (int w = 0; w < kBalanceThreads / 32; ++w) {
        const float low = simt::ld_shared(shared + 4 * w + 2 * k);
        const float high = simt::ld_shared(shared + 4 * w + 2 * k + 1);
        all.low = low < all.low ? low : all.low;
        all.high = all.high < high ? high : all.high;
      }
      *results[k] = all.ratio();
    }
    __syncthreads();
  }

  // Factors of mean 1.
  __device__ void write(float best) {
    float* factors = shared_ + areas_.inv_factor();
    if (thread_ < cols_) simt::st_shared(factors + thread_, best);
    __syncthreads();
    if (thread_ >= cols_) return;
    float sum = 0.0f;
    for (int c = 0; c < cols_; ++c) sum += simt::ld_shared(factors + c);
    const float inv_mean = static_cast<float>(cols_) / sum;
    write_float(args_.col_scale_type, args_.col_scale, first_col_ + thread_,
                core::stored_factor(best, inv_mean));
  }

  const BalanceArgs& args_;
  const BalanceAreas areas_;
  std::int64_t first_col_;
  int thread_;
  int cols_;
  float* row_scale_;
  float* shared_;
  float first_scale_ = 1.0f;
};

static __global__ void balance_kernel(const BalanceArgs args) { BalanceBlock(args).run(); }

}  // namespace hqq::cuda::device

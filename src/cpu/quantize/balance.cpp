#include "src/cpu/quantize/balance.hpp"

#include <algorithm>
#include <cmath>
#include <span>

#include "hqq/core/balance.hpp"
#include "src/cpu/parallel.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/quantize/balance.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/cpu/dispatch.hpp"
#include "src/cpu/lane-inl.h"
#include "src/cpu/quantize/load-inl.h"

HWY_BEFORE_NAMESPACE();
#include "hqq/core/balance_row.hpp"
HWY_AFTER_NAMESPACE();

#ifndef HQQ_CPU_BALANCE_TYPES
#define HQQ_CPU_BALANCE_TYPES
namespace hqq::cpu {

using core::kRowSlots;

// One tile of columns, transposed: values[c * padded_rows + r]. Rows past the end are 0.
struct SinkhornTile {
  std::int64_t rows = 0;
  std::int64_t padded_rows = 0;
  std::int64_t cols = 0;
  std::vector<float> values;
  std::vector<float> inv_factor;     // 1 / t, [cols]
  std::vector<float> row_scale;      // s, [padded_rows]
  std::vector<float> row_deviation;  // std of the rows of u / t / s, [padded_rows]
  std::vector<float> sum, square;    // of the columns of u / t / s, [cols * kRowSlots]
};

}  // namespace hqq::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace hqq::cpu {
namespace HWY_NAMESPACE {

namespace lanes = core::HWY_NAMESPACE;

// Fills neighbouring tiles, the first of which begins at column `col`. Together, because a row of
// one tile is a few cache lines of a page of its own.
template <class V>
HWY_INLINE void load_tiles_lanes(const GroupSource& source, std::int64_t col,
                                 std::span<SinkhornTile> tiles) {
  constexpr int kBlock = kRowSlots;
  std::int64_t cols = 0;
  for (const SinkhornTile& tile : tiles) cols += tile.cols;
  std::vector<float> rows(static_cast<std::size_t>(kBlock * cols));
  const std::int64_t count = tiles[0].rows;
  for (std::int64_t row = 0; row < count; row += kBlock) {
    for (std::int64_t l = 0; l < kBlock; ++l) {
      float* out = rows.data() + l * cols;
      if (row + l < count) {
        load_segment(source, row + l, col, cols, out);
      } else {
        std::fill_n(out, cols, 0.0f);
      }
    }
    const float* segment = rows.data();
    for (SinkhornTile& tile : tiles) {
      transpose(segment, cols, tile.cols, kBlock, tile.values.data() + row, tile.padded_rows);
      segment += tile.cols;
    }
  }
}

// One round over the rows: updates s so that rows of u / t / s have deviation 1 (by at most a
// factor of 2), leaves their deviations, and sums the columns of u / t / s.
template <class V>
HWY_INLINE void sinkhorn_round_lanes(SinkhornTile& tile) {
  constexpr int kLanes = lanes::LaneTraits<V>::kLanes;
  const V zero = lanes::set<V>(0.0f);
  std::fill(tile.sum.begin(), tile.sum.end(), 0.0f);
  std::fill(tile.square.begin(), tile.square.end(), 0.0f);
  for (std::int64_t row = 0; row < tile.padded_rows; row += kLanes) {
    const float* values = tile.values.data() + row;
    V sum = zero;
    V square = zero;
    for (std::int64_t c = 0; c < tile.cols; ++c) {
      const V x = lanes::load<V>(values + c * tile.padded_rows) *
                  lanes::set<V>(tile.inv_factor[static_cast<std::size_t>(c)]);
      sum = sum + x;
      square = square + x * x;
    }
    const lanes::RowStep<V> step = lanes::balance_row(
        sum, square, tile.cols, lanes::load<V>(&tile.row_scale[static_cast<std::size_t>(row)]));
    lanes::store(step.scale, &tile.row_scale[static_cast<std::size_t>(row)]);
    lanes::store(step.deviation, &tile.row_deviation[static_cast<std::size_t>(row)]);
    const std::int64_t slot = row % kRowSlots;
    for (std::int64_t c = 0; c < tile.cols; ++c) {
      const V v = lanes::load<V>(values + c * tile.padded_rows) *
                  lanes::set<V>(tile.inv_factor[static_cast<std::size_t>(c)]) * step.inv_scale;
      float* s = &tile.sum[static_cast<std::size_t>(c * kRowSlots + slot)];
      float* q = &tile.square[static_cast<std::size_t>(c * kRowSlots + slot)];
      lanes::store(lanes::load<V>(s) + v, s);
      lanes::store(lanes::load<V>(q) + v * v, q);
    }
  }
}

void load_tiles_simd(const GroupSource& source, std::int64_t col, std::span<SinkhornTile> tiles) {
  load_tiles_lanes<lanes::Vector>(source, col, tiles);
}
void sinkhorn_round_simd(SinkhornTile& tile) { sinkhorn_round_lanes<lanes::Vector>(tile); }

#if HWY_TARGET == HWY_STATIC_TARGET
void load_tiles_simd_scalar(const GroupSource& source, std::int64_t col,
                            std::span<SinkhornTile> tiles) {
  load_tiles_lanes<float>(source, col, tiles);
}
void sinkhorn_round_simd_scalar(SinkhornTile& tile) { sinkhorn_round_lanes<float>(tile); }
#endif

}  // namespace HWY_NAMESPACE
}  // namespace hqq::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace hqq::cpu {

HWY_EXPORT(load_tiles_simd);
HWY_EXPORT(sinkhorn_round_simd);

namespace {

// Tiles that are loaded together, and the memory that they may take.
constexpr std::int64_t kMaxTiles = 4;
constexpr std::int64_t kMaxTilesBytes = std::int64_t{8} << 20;

float slots_sum(const std::vector<float>& slots, std::int64_t c) {
  float total = 0.0f;
  for (int slot = 0; slot < kRowSlots; ++slot) {
    total += slots[static_cast<std::size_t>(c * kRowSlots + slot)];
  }
  return total;
}

// Standard deviations of the columns; 0 for a constant column.
std::vector<float> column_deviations(const SinkhornTile& tile) {
  std::vector<float> deviations(static_cast<std::size_t>(tile.cols));
  for (std::int64_t c = 0; c < tile.cols; ++c) {
    deviations[static_cast<std::size_t>(c)] =
        core::column_deviation(slots_sum(tile.sum, c), slots_sum(tile.square, c), tile.rows);
  }
  return deviations;
}

float spread_of(const float* deviations, std::int64_t count) {
  core::Spread spread;
  for (std::int64_t i = 0; i < count; ++i) spread.add(deviations[i]);
  return spread.ratio();
}

void start_at_overall_deviation(SinkhornTile& tile) {
  float square = 0.0f;
  const float* column = tile.values.data();
  for (std::int64_t c = 0; c < tile.cols; ++c, column += tile.padded_rows) {
    float slots[kRowSlots] = {};
    for (std::int64_t r = 0; r < tile.padded_rows; r += kRowSlots) {
      for (int k = 0; k < kRowSlots; ++k) slots[k] += column[r + k] * column[r + k];
    }
    float column_square = 0.0f;
    for (float slot : slots) column_square += slot;
    square += column_square;
  }
  std::fill(tile.row_scale.begin(), tile.row_scale.end(),
            core::overall_deviation(square, tile.rows * tile.cols));
}

void allocate(SinkhornTile& tile, std::int64_t rows, std::int64_t cols) {
  tile.rows = rows;
  tile.padded_rows = (rows + kRowSlots - 1) / kRowSlots * kRowSlots;
  tile.cols = cols;
  tile.values.resize(static_cast<std::size_t>(tile.padded_rows * cols));
  tile.inv_factor.assign(static_cast<std::size_t>(cols), 1.0f);
  tile.row_scale.resize(static_cast<std::size_t>(tile.padded_rows));
  tile.row_deviation.resize(static_cast<std::size_t>(tile.padded_rows));
  tile.sum.resize(static_cast<std::size_t>(cols * kRowSlots));
  tile.square.resize(static_cast<std::size_t>(cols * kRowSlots));
}

void balance_tile(SinkhornTile& tile, float* factors) {
  const std::int64_t cols = tile.cols;
  start_at_overall_deviation(tile);

  std::vector<float> factor(static_cast<std::size_t>(cols), 1.0f);
  std::vector<float> best = factor;
  for (core::BalanceSearch search; !search.done();) {
    HQQ_DISPATCH(sinkhorn_round_simd)(tile);
    const std::vector<float> deviations = column_deviations(tile);
    const bool better = search.round(spread_of(deviations.data(), cols),
                                     spread_of(tile.row_deviation.data(), tile.rows));
    if (better) best = factor;
    for (std::size_t c = 0; c < factor.size(); ++c) {
      factor[c] = core::next_factor(factor[c], deviations[c]);
      tile.inv_factor[c] = 1.0f / factor[c];
    }
  }
  float sum = 0.0f;
  for (float f : best) sum += f;
  const float inv_mean = static_cast<float>(cols) / sum;
  for (std::int64_t c = 0; c < cols; ++c) {
    factors[c] = core::stored_factor(best[static_cast<std::size_t>(c)], inv_mean);
  }
}

}  // namespace

std::vector<float> sinkhorn_factors(const GroupSource& source, std::int64_t tile_cols,
                                    int threads) {
  const std::int64_t cols = source.W.cols;
  const std::int64_t bytes = source.W.rows * tile_cols * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t together = std::clamp(kMaxTilesBytes / bytes, std::int64_t{1}, kMaxTiles);
  const std::int64_t unit_cols = tile_cols * together;
  std::vector<float> factors(static_cast<std::size_t>(cols));
  parallel_for((cols + unit_cols - 1) / unit_cols, threads, [&](std::int64_t unit) {
    // Reused between units: a fresh megabyte costs as much in page faults as a round.
    thread_local std::vector<SinkhornTile> tiles;
    tiles.resize(kMaxTiles);
    const std::int64_t begin = unit * unit_cols;
    std::size_t count = 0;
    for (std::int64_t col = begin; col < std::min(begin + unit_cols, cols); col += tile_cols) {
      allocate(tiles[count++], source.W.rows, std::min(tile_cols, cols - col));
    }
    HQQ_DISPATCH(load_tiles_simd)(source, begin, std::span(tiles).first(count));
    for (std::size_t t = 0; t < count; ++t) {
      balance_tile(tiles[t], factors.data() + begin + static_cast<std::int64_t>(t) * tile_cols);
    }
  });
  return factors;
}

}  // namespace hqq::cpu
#endif  // HWY_ONCE

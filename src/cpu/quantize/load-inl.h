// Weights of any dtype as float lanes: segments of rows, and tiles in which a lane holds a group.
#if defined(HQQ_CPU_LOAD_TOGGLE) == defined(HWY_TARGET_TOGGLE)
#ifdef HQQ_CPU_LOAD_TOGGLE
#undef HQQ_CPU_LOAD_TOGGLE
#else
#define HQQ_CPU_LOAD_TOGGLE
#endif

#include "hqq/core/group.hpp"
#include "hqq/tensor.hpp"
#include "src/cpu/lane-inl.h"
#include "src/cpu/quantize/group_source.hpp"

HWY_BEFORE_NAMESPACE();
namespace hqq::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using core::HWY_NAMESPACE::FloatTag;
using core::HWY_NAMESPACE::IntTag;
using core::HWY_NAMESPACE::Vector;

// n consecutive weights as float32 (float64 rounds to nearest even).
HWY_INLINE void convert_f16(const std::uint16_t* src, std::int64_t n, float* dst) {
  std::int64_t i = 0;
#if HWY_TARGET != HWY_EMU128 && HWY_TARGET != HWY_SCALAR
  constexpr int kLanes = core::HWY_NAMESPACE::LaneTraits<Vector>::kLanes;
  const hn::Rebind<hwy::float16_t, FloatTag> halves;
  for (; i + kLanes <= n; i += kLanes) {
    const auto h = hn::LoadU(halves, reinterpret_cast<const hwy::float16_t*>(src + i));
    hn::StoreU(hn::PromoteTo(FloatTag(), h), FloatTag(), dst + i);
  }
#endif
  for (; i < n; ++i) dst[i] = core::HWY_NAMESPACE::f16_bits_to_f32(src[i]);
}

HWY_INLINE void convert_bf16(const std::uint16_t* src, std::int64_t n, float* dst) {
  constexpr int kLanes = core::HWY_NAMESPACE::LaneTraits<Vector>::kLanes;
  const hn::Rebind<std::uint16_t, FloatTag> halves;
  const hn::Rebind<std::uint32_t, FloatTag> words;
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const auto w = hn::ShiftLeft<16>(hn::PromoteTo(words, hn::LoadU(halves, src + i)));
    hn::StoreU(hn::BitCast(FloatTag(), w), FloatTag(), dst + i);
  }
  for (; i < n; ++i) dst[i] = core::HWY_NAMESPACE::bf16_bits_to_f32(src[i]);
}

// Weights [col, col + n) of a row, divided by the column factors if there are any.
HWY_INLINE void load_segment(const GroupSource& source, std::int64_t row, std::int64_t col,
                             std::int64_t n, float* dst) {
  const std::int64_t at = row * source.W.row_stride + col;
  switch (source.W.dtype) {
    case DType::kF16:
      convert_f16(static_cast<const std::uint16_t*>(source.W.data) + at, n, dst);
      break;
    case DType::kBF16:
      convert_bf16(static_cast<const std::uint16_t*>(source.W.data) + at, n, dst);
      break;
    case DType::kF64: {
      const double* p = static_cast<const double*>(source.W.data) + at;
      for (std::int64_t i = 0; i < n; ++i) dst[i] = static_cast<float>(p[i]);
      break;
    }
    default:
      std::memcpy(dst, static_cast<const float*>(source.W.data) + at,
                  static_cast<std::size_t>(n) * sizeof(float));
  }
  if (source.inv_col_scale != nullptr) {
    const float* factor = source.inv_col_scale + col;
    for (std::int64_t i = 0; i < n; ++i) dst[i] *= factor[i];
  }
}

// Like load_segment(), without a copy where the matrix already holds the values.
HWY_INLINE const float* segment(const GroupSource& source, std::int64_t row, std::int64_t col,
                                std::int64_t n, float* buffer) {
  if (source.W.dtype == DType::kF32 && source.inv_col_scale == nullptr) {
    return static_cast<const float*>(source.W.data) + row * source.W.row_stride + col;
  }
  load_segment(source, row, col, n, buffer);
  return buffer;
}

// rows[l * stride + i] -> tile[i * tile_stride + l] for l < lanes, i < n, in blocks of 4 x 4.
HWY_INLINE void transpose(const float* rows, std::int64_t stride, std::int64_t n, int lanes,
                          float* tile, std::int64_t tile_stride) {
  std::int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::FixedTag<float, 4> four;
  for (; i + 4 <= n; i += 4) {
    for (int l = 0; l + 4 <= lanes; l += 4) {
      const auto a = hn::LoadU(four, rows + (l + 0) * stride + i);
      const auto b = hn::LoadU(four, rows + (l + 1) * stride + i);
      const auto c = hn::LoadU(four, rows + (l + 2) * stride + i);
      const auto d = hn::LoadU(four, rows + (l + 3) * stride + i);
      const auto ab_lo = hn::InterleaveLower(four, a, b);
      const auto ab_hi = hn::InterleaveUpper(four, a, b);
      const auto cd_lo = hn::InterleaveLower(four, c, d);
      const auto cd_hi = hn::InterleaveUpper(four, c, d);
      float* out = tile + i * tile_stride + l;
      hn::StoreU(hn::ConcatLowerLower(four, cd_lo, ab_lo), four, out);
      hn::StoreU(hn::ConcatUpperUpper(four, cd_lo, ab_lo), four, out + tile_stride);
      hn::StoreU(hn::ConcatLowerLower(four, cd_hi, ab_hi), four, out + 2 * tile_stride);
      hn::StoreU(hn::ConcatUpperUpper(four, cd_hi, ab_hi), four, out + 3 * tile_stride);
    }
  }
#endif
  for (; i < n; ++i) {
    for (int l = 0; l < lanes; ++l) tile[i * tile_stride + l] = rows[l * stride + i];
  }
}

// Axis 1: `lanes` rows from `row` on (rows past the end repeat the last one), columns [col, col +
// n). `scratch` has lanes * n floats. tile[i * lanes + l] is weight i of the group of row + l.
HWY_INLINE void load_row_tile(const GroupSource& source, std::int64_t row, std::int64_t col,
                              std::int64_t n, int lanes, float* scratch, float* tile) {
  if (lanes == 1) {
    load_segment(source, row, col, n, tile);
    return;
  }
  if (source.W.dtype == DType::kF32 && source.inv_col_scale == nullptr &&
      row + lanes <= source.W.rows) {
    const float* rows = static_cast<const float*>(source.W.data) + row * source.W.row_stride + col;
    transpose(rows, source.W.row_stride, n, lanes, tile, lanes);
    return;
  }
  for (int l = 0; l < lanes; ++l) {
    const std::int64_t r = row + l < source.W.rows ? row + l : source.W.rows - 1;
    load_segment(source, r, col, n, scratch + l * n);
  }
  transpose(scratch, n, n, lanes, tile, lanes);
}

// The flat positions [position, position + n), across row ends.
HWY_INLINE void load_flat(const GroupSource& source, std::int64_t position, std::int64_t n,
                          float* dst) {
  const std::int64_t cols = source.W.cols;
  while (n > 0) {
    const std::int64_t col = position % cols;
    const std::int64_t run = n < cols - col ? n : cols - col;
    load_segment(source, position / cols, col, run, dst);
    position += run;
    dst += run;
    n -= run;
  }
}

// Axis 0: groups j .. j + lanes - 1 of n weights each; lanes past `count` repeat the last group.
// `table` (null: none) is one value a column, spread to the same tile shape in `spread`.
HWY_INLINE void load_strided_tile(const GroupSource& source, std::int64_t j, int count,
                                  std::int64_t n, int lanes, float* tile, const float* table,
                                  float* spread) {
  const std::int64_t groups = source.layout.num_groups();
  for (std::int64_t i = 0; i < n; ++i) {
    float* out = tile + i * lanes;
    load_flat(source, j + i * groups, count, out);
    for (int l = count; l < lanes; ++l) out[l] = out[count - 1];
    if (table == nullptr) continue;
    for (int l = 0; l < lanes; ++l) {
      const int real = l < count ? l : count - 1;
      spread[i * lanes + l] = table[(j + real + i * groups) % source.W.cols];
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace hqq::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

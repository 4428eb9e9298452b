#include "src/cpu/quantize/encode.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/quantize/encode.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/cpu/dispatch.hpp"
#include "src/cpu/lane-inl.h"
#include "src/cpu/quantize/load-inl.h"

HWY_BEFORE_NAMESPACE();
namespace hqq::cpu {
namespace HWY_NAMESPACE {

namespace lanes = core::HWY_NAMESPACE;

// Errors are summed in this many slots (weight i in slot i % kSlots), a multiple of every lane
// count, so that sums do not depend on the target.
constexpr int kSlots = 16;

// Per-weight values of one row, padded to whole blocks of kSlots.
struct RowBuffers {
  std::vector<float> weights, balanced, scale, inv_scale, zero;
  std::vector<std::uint8_t> codes;

  void resize(std::int64_t cols) {
    const auto size = static_cast<std::size_t>((cols + kSlots - 1) / kSlots * kSlots);
    // Each for itself: memory may have run out between them.
    for (auto* v : {&weights, &balanced, &scale, &inv_scale, &zero}) {
      if (v->size() < size) v->resize(size);
    }
    if (codes.size() < size) codes.resize(size);
  }
};

HWY_INLINE RowBuffers& row_buffers(std::int64_t cols) {
  thread_local RowBuffers buffers;
  buffers.resize(cols);
  return buffers;
}

// Values of the groups that the weights of a row belong to, one a weight. Axis 0: neighbours are in
// neighbouring groups, which wrap around.
HWY_INLINE void spread(const core::GroupLayout& layout, const float* values, std::int64_t row,
                       float* out) {
  if (layout.axis == 1) {
    const float* v = values + row * layout.groups_per_row();
    for (std::int64_t gi = 0; gi < layout.groups_per_row(); ++gi) {
      float* begin = out + gi * layout.group_size;
      std::fill(begin, begin + layout.length_in_row(gi), v[gi]);
    }
    return;
  }
  const std::int64_t groups = layout.num_groups();
  std::int64_t group = row * layout.cols % groups;
  for (std::int64_t col = 0; col < layout.cols;) {
    const std::int64_t run = std::min(layout.cols - col, groups - group);
    std::copy(values + group, values + group + run, out + col);
    col += run;
    group = 0;
  }
}

// Codes of n weights; scale and zero advance by `step` values a weight (0: shared by all).
template <class V>
HWY_INLINE void encode_span(const float* weights, std::int64_t n, const float* inv_scale,
                            const float* zero, std::int64_t step, int max_code,
                            std::uint8_t* codes) {
  constexpr int kLanes = lanes::LaneTraits<V>::kLanes;
  const auto encode = [&](auto tag, std::int64_t i) HWY_ATTR {
    using L = decltype(tag);
    const L inv = step == 0 ? lanes::set<L>(*inv_scale) : lanes::load<L>(inv_scale + i);
    const L z = step == 0 ? lanes::set<L>(*zero) : lanes::load<L>(zero + i);
    lanes::store_code(lanes::encode(lanes::load<L>(weights + i), inv, z,
                                    lanes::set<L>(static_cast<float>(max_code))),
                      codes + i);
  };
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) encode(lanes::set<V>(0.0f), i);
  for (; i < n; ++i) encode(0.0f, i);
}

// These sums in double, for weights whose squares leave the range of float.
HWY_NOINLINE core::ErrorSums extreme_row_error(const float* weights, const RowBuffers& b,
                                               const float* col_scale, std::int64_t cols) {
  core::ErrorSums error{};
  for (std::int64_t i = 0; i < cols; ++i) {
    const auto k = static_cast<std::size_t>(i);
    float r = (static_cast<float>(b.codes[k]) - b.zero[k]) * b.scale[k];
    if (col_scale != nullptr) r = r * col_scale[i];
    const auto w = static_cast<double>(weights[i]);
    const double e = std::abs(w - static_cast<double>(r));
    error.abs_sum += e;
    error.square_sum += e * e;
    error.weight_square_sum += w * w;
    error.max_abs = std::max(error.max_abs, e);
  }
  return error;
}

template <class V>
HWY_INLINE void encode_row_lanes(const EncodeArgs& args, std::int64_t row) {
  constexpr int kLanes = lanes::LaneTraits<V>::kLanes;
  const std::int64_t cols = args.source.W.cols;
  RowBuffers& b = row_buffers(cols);
  const float* balanced = segment(args.source, row, 0, cols, b.balanced.data());
  const core::GroupLayout& layout = args.source.layout;
  if (layout.axis == 1) {
    const std::int64_t first = row * layout.groups_per_row();
    for (std::int64_t gi = 0; gi < layout.groups_per_row(); ++gi) {
      const std::int64_t col = gi * layout.group_size;
      encode_span<V>(balanced + col, layout.length_in_row(gi), args.values.inv_scale + first + gi,
                     args.values.zero + first + gi, 0, args.format.max_code, &b.codes[col]);
    }
  } else {
    spread(layout, args.values.inv_scale, row, b.inv_scale.data());
    spread(layout, args.values.zero, row, b.zero.data());
    encode_span<V>(balanced, cols, b.inv_scale.data(), b.zero.data(), 1, args.format.max_code,
                   b.codes.data());
  }
  core::pack_row(args.format, b.codes.data(), cols, args.packed + row * args.row_bytes);
  if (args.errors == nullptr) return;

  spread(layout, args.values.scale, row, b.scale.data());
  spread(layout, args.values.zero, row, b.zero.data());
  GroupSource plain = args.source;
  plain.inv_col_scale = nullptr;
  const float* weights = segment(plain, row, 0, cols, b.weights.data());
  float abs_sum[kSlots] = {};
  float square_sum[kSlots] = {};
  float weight_square[kSlots] = {};
  float max_abs[kSlots] = {};
  const auto accumulate = [&](auto tag, std::int64_t i, int slot) HWY_ATTR {
    using L = decltype(tag);
    L r = (lanes::load_code<L>(&b.codes[i]) - lanes::load<L>(&b.zero[i])) *
          lanes::load<L>(&b.scale[i]);
    if (args.col_scale != nullptr) r = r * lanes::load<L>(args.col_scale + i);
    const L w = lanes::load<L>(weights + i);
    const L e = lanes::abs(w - r);
    lanes::store(lanes::load<L>(abs_sum + slot) + e, abs_sum + slot);
    lanes::store(lanes::load<L>(square_sum + slot) + e * e, square_sum + slot);
    lanes::store(lanes::load<L>(weight_square + slot) + w * w, weight_square + slot);
    lanes::store(lanes::max(lanes::load<L>(max_abs + slot), e), max_abs + slot);
  };
  std::int64_t i = 0;
  for (; i + kSlots <= cols; i += kSlots) {
    for (int slot = 0; slot < kSlots; slot += kLanes) {
      accumulate(lanes::set<V>(0.0f), i + slot, slot);
    }
  }
  for (int slot = 0; i < cols; ++i, ++slot) accumulate(0.0f, i, slot);
  core::ErrorSums error{};
  for (int slot = 0; slot < kSlots; ++slot) {
    error.abs_sum += static_cast<double>(abs_sum[slot]);
    error.square_sum += static_cast<double>(square_sum[slot]);
    error.weight_square_sum += static_cast<double>(weight_square[slot]);
    error.max_abs = std::max(error.max_abs, static_cast<double>(max_abs[slot]));
  }
  if (!(error.square_sum < 1e30) || error.weight_square_sum < 1e-25) {
    error = extreme_row_error(weights, b, args.col_scale, cols);
  }
  args.errors[row] = error;
}

template <class V>
HWY_INLINE void dequantize_row_lanes(const DequantizeArgs& args, std::int64_t row, float* out) {
  constexpr int kLanes = lanes::LaneTraits<V>::kLanes;
  const std::int64_t cols = args.layout.cols;
  RowBuffers& b = row_buffers(cols);
  core::unpack_row(args.format, args.packed + row * args.row_bytes, cols, b.codes.data());
  spread(args.layout, args.values.scale, row, b.scale.data());
  spread(args.layout, args.values.zero, row, b.zero.data());
  const auto dequantize = [&](auto tag, std::int64_t i) HWY_ATTR {
    using L = decltype(tag);
    L r = (lanes::load_code<L>(&b.codes[i]) - lanes::load<L>(&b.zero[i])) *
          lanes::load<L>(&b.scale[i]);
    if (args.col_scale != nullptr) r = r * lanes::load<L>(args.col_scale + i);
    lanes::store(r, out + i);
  };
  std::int64_t i = 0;
  for (; i + kLanes <= cols; i += kLanes) dequantize(lanes::set<V>(0.0f), i);
  for (; i < cols; ++i) dequantize(0.0f, i);
}

template <class V>
HWY_INLINE std::int64_t count_nonfinite_lanes(const GroupSource& source, std::int64_t row,
                                              std::int64_t* first) {
  constexpr int kLanes = lanes::LaneTraits<V>::kLanes;
  const std::int64_t cols = source.W.cols;
  RowBuffers& b = row_buffers(cols);
  const float* weights = segment(source, row, 0, cols, b.weights.data());
  // x - x is 0 for finite x, NaN otherwise: one comparison for the whole row.
  V sum = lanes::set<V>(0.0f);
  std::int64_t i = 0;
  for (; i + kLanes <= cols; i += kLanes) {
    const V x = lanes::load<V>(weights + i);
    sum = sum + (x - x);
  }
  float parts[kLanes];
  lanes::store(sum, parts);
  bool finite = true;
  for (float part : parts) finite = finite && part == 0.0f;
  for (std::int64_t k = i; k < cols; ++k) finite = finite && weights[k] - weights[k] == 0.0f;
  if (finite) return 0;
  std::int64_t count = 0;
  for (std::int64_t k = 0; k < cols; ++k) {
    if (weights[k] - weights[k] == 0.0f) continue;
    if (count == 0) *first = k;
    ++count;
  }
  return count;
}

void encode_row_simd(const EncodeArgs& args, std::int64_t row) {
  encode_row_lanes<lanes::Vector>(args, row);
}
void dequantize_row_simd(const DequantizeArgs& args, std::int64_t row, float* out) {
  dequantize_row_lanes<lanes::Vector>(args, row, out);
}
std::int64_t count_nonfinite_simd(const GroupSource& source, std::int64_t row,
                                  std::int64_t* first) {
  return count_nonfinite_lanes<lanes::Vector>(source, row, first);
}

#if HWY_TARGET == HWY_STATIC_TARGET
void encode_row_simd_scalar(const EncodeArgs& args, std::int64_t row) {
  encode_row_lanes<float>(args, row);
}
void dequantize_row_simd_scalar(const DequantizeArgs& args, std::int64_t row, float* out) {
  dequantize_row_lanes<float>(args, row, out);
}
std::int64_t count_nonfinite_simd_scalar(const GroupSource& source, std::int64_t row,
                                         std::int64_t* first) {
  return count_nonfinite_lanes<float>(source, row, first);
}
#endif

}  // namespace HWY_NAMESPACE
}  // namespace hqq::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace hqq::cpu {

HWY_EXPORT(encode_row_simd);
HWY_EXPORT(dequantize_row_simd);
HWY_EXPORT(count_nonfinite_simd);

void encode_row(const EncodeArgs& args, std::int64_t row) {
  HQQ_DISPATCH(encode_row_simd)(args, row);
}
void dequantize_row(const DequantizeArgs& args, std::int64_t row, float* out) {
  HQQ_DISPATCH(dequantize_row_simd)(args, row, out);
}
std::int64_t count_nonfinite(const GroupSource& source, std::int64_t row, std::int64_t* first) {
  return HQQ_DISPATCH(count_nonfinite_simd)(source, row, first);
}

}  // namespace hqq::cpu
#endif  // HWY_ONCE

// x as the kernels take it. Codes are the same for every instruction set. Included inside the
// namespace of an instruction set.

// The scale that maps the largest value to 127, and its reciprocal. NaN and Inf reach y through it;
// blocks of zeros and of subnormal scale get codes 0.
struct ScaleOfBlock {
  explicit ScaleOfBlock(float max_abs) : scale(max_abs / 127.0f) {
    inv_scale = scale >= 1.17549435e-38f && max_abs <= 3.402823466e38f ? 1.0f / scale : 0.0f;
  }
  float scale, inv_scale;
};

// No factor, or no zero.
struct Nothing {};

// x [cols] times a factor [cols] of float, float16 or Nothing -> codes and blocks. With zeros
// [cols] also the sum of zero * x, one part in every lane, x as rounded.
template <class Factor, class Zero>
struct Quantizer {
  const float* x;
  const Factor* factor;
  const Zero* zero;
  Isa::Floats weighted = Isa::zero();

  static constexpr bool kHasFactor = !__is_same(Factor, Nothing);
  static constexpr bool kHasZero = !__is_same(Zero, Nothing);

  // A block that fills registers.
  HQQ_INLINE BlockOfX block(std::int64_t first, int cols, std::int8_t* codes) {
    float values[kMaxBlockCols];
    Isa::Ints largest = Isa::zero_ints();
    for (int i = 0; i < cols; i += Isa::kRows) {
      Isa::Floats v = Isa::load(x + first + i);
      if constexpr (kHasFactor) v = Isa::mul(v, Isa::load(factor + first + i));
      Isa::store(values + i, v);
      largest = Isa::max_abs_bits(largest, v);
    }
    const ScaleOfBlock s(Isa::largest_lane(largest));
    const Isa::Floats inv_scale = Isa::set(s.inv_scale);
    Isa::Ints sum = Isa::zero_ints();
    Isa::Floats weighted_codes = Isa::zero();
    for (int i = 0; i < cols; i += Isa::kRows) {
      const Isa::Ints rounded = Isa::round(Isa::mul(Isa::load(values + i), inv_scale));
      sum = Isa::add_ints(sum, rounded);
      Isa::store_codes(codes + first + i, rounded);
      if constexpr (kHasZero) {
        weighted_codes = Isa::fma(Isa::from(rounded), Isa::load(zero + first + i), weighted_codes);
      }
    }
    if constexpr (kHasZero) weighted = Isa::fma(weighted_codes, Isa::set(s.scale), weighted);
    return {s.scale, static_cast<float>(Isa::sum_lanes(sum))};
  }

  // Any other block.
  BlockOfX ragged_block(std::int64_t first, int cols, std::int8_t* codes) {
    constexpr int kPadded = kMaxBlockCols + Isa::kRows;
    float padded_x[kPadded] = {};
    Factor padded_factor[kPadded] = {};
    Zero padded_zero[kPadded] = {};
    std::int8_t padded_codes[kPadded];
    const auto count = static_cast<std::size_t>(cols);
    std::memcpy(padded_x, x + first, count * sizeof(float));
    if constexpr (kHasFactor) std::memcpy(padded_factor, factor + first, count * sizeof(Factor));
    if constexpr (kHasZero) std::memcpy(padded_zero, zero + first, count * sizeof(Zero));
    Quantizer padded{padded_x, padded_factor, padded_zero, weighted};
    const BlockOfX info =
        padded.block(0, (cols + Isa::kRows - 1) / Isa::kRows * Isa::kRows, padded_codes);
    weighted = padded.weighted;
    std::memcpy(codes + first, padded_codes, count);
    return info;
  }

  void all(const ColumnPlan& plan, std::int8_t* codes, BlockOfX* blocks) {
    for (std::int64_t b = 0; b < plan.num_blocks; ++b) {
      const Block& at = plan.blocks[b];
      blocks[b] = at.cols % Isa::kRows == 0 ? block(at.first_col, at.cols, codes)
                                            : ragged_block(at.first_col, at.cols, codes);
    }
    const Block& last = plan.blocks[plan.num_blocks - 1];
    for (std::int64_t i = last.first_col + last.cols; i < plan.units * kUnitCols; ++i) codes[i] = 0;
  }
};

void quantize_x(const float* x, const float* factor, const ColumnPlan& plan, std::int8_t* codes,
                BlockOfX* blocks) {
  if (factor == nullptr) {
    Quantizer<Nothing, Nothing>{x, nullptr, nullptr}.all(plan, codes, blocks);
  } else {
    Quantizer<float, Nothing>{x, factor, nullptr}.all(plan, codes, blocks);
  }
}

template <class Meta>
float quantize_scaled_x_as(const float* x, const void* scale, const void* zero,
                           const ColumnPlan& plan, std::int8_t* codes, BlockOfX* blocks) {
  Quantizer<Meta, Meta> quantizer{x, static_cast<const Meta*>(scale),
                                  static_cast<const Meta*>(zero)};
  quantizer.all(plan, codes, blocks);
  float lanes[Isa::kRows];
  Isa::store(lanes, quantizer.weighted);
  float sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

float quantize_scaled_x(const float* x, const void* scale, const void* zero, MetaType type,
                        const ColumnPlan& plan, std::int8_t* codes, BlockOfX* blocks) {
  return type == MetaType::kF16
             ? quantize_scaled_x_as<std::uint16_t>(x, scale, zero, plan, codes, blocks)
             : quantize_scaled_x_as<float>(x, scale, zero, plan, codes, blocks);
}

// What `shifted` values of the byte positions are multiplied with: Isa::byte_shifted leaves the
// bytes 0, 1 and 2 where they are.
constexpr float kShifts[kFieldCols] = {1.0f, 1.0f / 256, 1.0f / 65536, 1.0f};
constexpr float kInverseShifts[kFieldCols] = {1.0f, 256.0f, 65536.0f, 1.0f};

// Sums run in eight lanes, as loops that compilers vectorize; the order of additions is fixed.
constexpr int kLanes = 8;
HQQ_INLINE float sum_of_lanes(const float (&lanes)[kLanes]) {
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
         ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

void copy_x(const float* x, const float* factor, const ColumnPlan& plan, bool shifted,
            float* values, BlockOfX* blocks) {
  const Block& last = plan.blocks[plan.num_blocks - 1];
  const std::int64_t cols = last.first_col + last.cols;
  for (std::int64_t i = 0; i < cols; ++i) values[i] = factor == nullptr ? x[i] : x[i] * factor[i];
  for (std::int64_t i = cols; i < plan.units * kUnitCols; ++i) values[i] = 0;
  for (std::int64_t b = 0; b < plan.num_blocks; ++b) {
    const float* v = values + plan.blocks[b].first_col;
    const int count = plan.blocks[b].cols;
    float lanes[kLanes] = {};
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) lanes[l] += v[i + l];
    }
    for (int l = 0; i < count; ++i, ++l) lanes[l] += v[i];
    blocks[b] = {1.0f, sum_of_lanes(lanes)};
  }
  if (!shifted) return;
  for (std::int64_t i = 0; i < plan.units * kUnitCols; i += kFieldCols) {
    for (int j = 0; j < kFieldCols; ++j) values[i + j] *= kShifts[j];
  }
}

// sum of values * weights [plan.units * 32], where copy_x made the values.
float weighted_sum(const float* values, const float* weights, const ColumnPlan& plan,
                   bool shifted) {
  float lanes[kLanes] = {};
  for (std::int64_t i = 0; i < plan.units * kUnitCols; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const float unshift = shifted ? kInverseShifts[l % kFieldCols] : 1.0f;
      lanes[l] += values[i + l] * unshift * weights[i + l];
    }
  }
  return sum_of_lanes(lanes);
}

// uint8 [groups][16] -> code * step + offset, with a step and an offset for each of the 16.
void read_u8(const std::uint8_t* in, std::int64_t groups, const float* step, const float* offset,
             float* out) {
  Isa::Floats steps[kParts], offsets[kParts];
  for (int part = 0; part < kParts; ++part) {
    steps[part] = Isa::load(step + part * Isa::kRows);
    offsets[part] = Isa::load(offset + part * Isa::kRows);
  }
  for (std::int64_t g = 0; g < groups; ++g) {
    for (int part = 0; part < kParts; ++part) {
      const std::int64_t at = g * kTileRows + part * Isa::kRows;
      Isa::store(out + at,
                 Isa::add(Isa::mul(Isa::from_bytes(in + at), steps[part]), offsets[part]));
    }
  }
}

// float16 -> float32.
void read_f16(const std::uint16_t* in, std::int64_t count, float* out) {
  std::int64_t i = 0;
  for (; i + Isa::kRows <= count; i += Isa::kRows) Isa::store(out + i, Isa::load(in + i));
  if (i == count) return;
  std::uint16_t rest[Isa::kRows] = {};
  float values[Isa::kRows];
  std::memcpy(rest, in + i, static_cast<std::size_t>(count - i) * sizeof(std::uint16_t));
  Isa::store(values, Isa::load(rest));
  std::memcpy(out + i, values, static_cast<std::size_t>(count - i) * sizeof(float));
}

// x as the kernels take it. The results are the same for every instruction set. Included inside the
// namespace of an instruction set.

// x[i] * factor[i] for a register of columns.
HQQ_INLINE Isa::Floats scaled(const float* x, const float* factor, std::int64_t i) {
  const Isa::Floats v = Isa::load(x + i);
  return factor == nullptr ? v : Isa::mul(v, Isa::load(factor + i));
}

// The scale that maps the largest value to 127, and its reciprocal. NaN and Inf reach y through it;
// blocks of zeros and of subnormal scale get codes 0.
struct ScaleOfBlock {
  explicit ScaleOfBlock(float max_abs) : scale(max_abs / 127.0f) {
    inv_scale = scale >= 1.17549435e-38f && max_abs <= 3.402823466e38f ? 1.0f / scale : 0.0f;
  }
  float scale, inv_scale;
};

// A block that fills registers.
HQQ_INLINE BlockOfX quantize_block(const float* x, const float* factor, const Block& block,
                                   std::int8_t* codes) {
  float values[kMaxBlockCols];
  Isa::Ints largest = Isa::zero_ints();
  for (int i = 0; i < block.cols; i += Isa::kRows) {
    const Isa::Floats v = scaled(x, factor, block.first_col + i);
    Isa::store(values + i, v);
    largest = Isa::max_abs_bits(largest, v);
  }
  const ScaleOfBlock s(Isa::largest_lane(largest));
  const Isa::Floats inv_scale = Isa::set(s.inv_scale);
  Isa::Ints sum = Isa::zero_ints();
  for (int i = 0; i < block.cols; i += Isa::kRows) {
    const Isa::Ints rounded = Isa::round(Isa::mul(Isa::load(values + i), inv_scale));
    sum = Isa::add_ints(sum, rounded);
    Isa::store_codes(codes + block.first_col + i, rounded);
  }
  return {s.scale, static_cast<float>(Isa::sum_lanes(sum))};
}

// Any other block.
BlockOfX quantize_ragged_block(const float* x, const float* factor, const Block& block,
                               std::int8_t* codes) {
  float values[kMaxBlockCols + Isa::kRows] = {};
  float factors[kMaxBlockCols + Isa::kRows] = {};
  std::int8_t padded_codes[kMaxBlockCols + Isa::kRows];
  std::memcpy(values, x + block.first_col, static_cast<std::size_t>(block.cols) * sizeof(float));
  if (factor != nullptr) {
    std::memcpy(factors, factor + block.first_col,
                static_cast<std::size_t>(block.cols) * sizeof(float));
  }
  const Block padded{0, (block.cols + Isa::kRows - 1) / Isa::kRows * Isa::kRows, 0};
  const BlockOfX info =
      quantize_block(values, factor == nullptr ? nullptr : factors, padded, padded_codes);
  std::memcpy(codes + block.first_col, padded_codes, static_cast<std::size_t>(block.cols));
  return info;
}

void quantize_x(const float* x, const float* factor, const ColumnPlan& plan, std::int8_t* codes,
                BlockOfX* blocks) {
  for (std::int64_t b = 0; b < plan.num_blocks; ++b) {
    const Block& block = plan.blocks[b];
    blocks[b] = block.cols % Isa::kRows == 0 ? quantize_block(x, factor, block, codes)
                                             : quantize_ragged_block(x, factor, block, codes);
  }
  const Block& last = plan.blocks[plan.num_blocks - 1];
  for (std::int64_t i = last.first_col + last.cols; i < plan.units * kUnitCols; ++i) codes[i] = 0;
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

// sum of x * weights, where x is a prepared row and `weights` has plan.units * kUnitCols values.
float weighted_sum(const RowOfX& x, const float* weights, const ColumnPlan& plan, bool shifted) {
  if (x.codes == nullptr) {
    float lanes[kLanes] = {};
    for (std::int64_t i = 0; i < plan.units * kUnitCols; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        const float unshift = shifted ? kInverseShifts[l % kFieldCols] : 1.0f;
        lanes[l] += x.values[i + l] * unshift * weights[i + l];
      }
    }
    return sum_of_lanes(lanes);
  }
  float total = 0;
  for (std::int64_t b = 0; b < plan.num_blocks; ++b) {
    const Block& block = plan.blocks[b];
    float lanes[kLanes] = {};
    // Up to the end of a unit, where codes and weights are zeros.
    for (int i = 0; i < block.cols; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        const std::int64_t col = block.first_col + i + l;
        lanes[l] += static_cast<float>(x.codes[col]) * weights[col];
      }
    }
    total += x.blocks[b].scale * sum_of_lanes(lanes);
  }
  return total;
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

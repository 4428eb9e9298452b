// NEON of every 64-bit Arm: four rows in a register. Included inside a namespace.

struct Isa {
  static constexpr int kRows = 4;
  using Bytes = uint8x16_t;    // [4 rows][4 columns]
  using Ints = int32x4_t;      // [4 rows]
  using Floats = float32x4_t;  // [4 rows]

  HQQ_INLINE static Bytes load(const std::uint8_t* p) { return vld1q_u8(p); }
  HQQ_INLINE static void store(std::uint8_t* p, Bytes v) { vst1q_u8(p, v); }
  template <int kMask>
  HQQ_INLINE static Bytes and_mask(Bytes v) {
    return vandq_u8(v, vdupq_n_u8(kMask));
  }
  template <int kShift>
  HQQ_INLINE static Bytes shift_right(Bytes v) {
    return vshrq_n_u8(v, kShift);
  }
  HQQ_INLINE static Bytes or_(Bytes a, Bytes b) { return vorrq_u8(a, b); }
  // Four codes of x, for every row.
  HQQ_INLINE static Bytes broadcast4(const std::int8_t* p) {
    std::int32_t four;
    std::memcpy(&four, p, 4);
    return vreinterpretq_u8_s32(vdupq_n_s32(four));
  }

  // Byte kByte of every row, times 256^kByte except for the last byte; the power of two is in x
  // (copy_x, `shifted`).
  template <int kByte>
  HQQ_INLINE static Floats byte_shifted(Bytes v) {
    const uint32x4_t rows = vreinterpretq_u32_u8(v);
    if constexpr (kByte == 3) return vcvtq_f32_u32(vshrq_n_u32(rows, 24));
    return vcvtq_f32_u32(vandq_u32(rows, vdupq_n_u32(255u << (8 * kByte))));
  }
  template <int kByte>
  HQQ_INLINE static Floats byte(Bytes v) {
    uint32x4_t rows = vreinterpretq_u32_u8(v);
    if constexpr (kByte > 0) rows = vshrq_n_u32(rows, 8 * kByte);
    return vcvtq_f32_u32(vandq_u32(rows, vdupq_n_u32(255)));
  }

  HQQ_INLINE static Floats zero() { return vdupq_n_f32(0.0f); }
  HQQ_INLINE static Floats set(float x) { return vdupq_n_f32(x); }
  HQQ_INLINE static Floats broadcast(const float* p) { return vld1q_dup_f32(p); }
  HQQ_INLINE static Floats load(const float* p) { return vld1q_f32(p); }
  HQQ_INLINE static Floats load(const std::uint16_t* f16) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(f16)));
  }
  HQQ_INLINE static void store(float* p, Floats v) { vst1q_f32(p, v); }
  HQQ_INLINE static Ints zero_ints() { return vdupq_n_s32(0); }
  // The larger absolute value, as the bits of a float: their order is that of the values, NaN last.
  HQQ_INLINE static Ints max_abs_bits(Ints largest, Floats v) {
    return vmaxq_s32(largest, vreinterpretq_s32_f32(vabsq_f32(v)));
  }
  HQQ_INLINE static float largest_lane(Ints bits) {
    const std::int32_t largest = vmaxvq_s32(bits);
    float value;
    std::memcpy(&value, &largest, 4);
    return value;
  }
  HQQ_INLINE static std::int32_t sum_lanes(Ints ints) { return vaddvq_s32(ints); }
  // To nearest, ties to even.
  HQQ_INLINE static Ints round(Floats v) { return vcvtnq_s32_f32(v); }
  // The low bytes.
  HQQ_INLINE static void store_codes(std::int8_t* p, Ints v) {
    const int16x4_t halves = vmovn_s32(v);
    const int8x8_t bytes = vmovn_s16(vcombine_s16(halves, halves));
    const std::int32_t four = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
    std::memcpy(p, &four, 4);
  }
  HQQ_INLINE static Ints add_ints(Ints a, Ints b) { return vaddq_s32(a, b); }
  HQQ_INLINE static Floats from(Ints v) { return vcvtq_f32_s32(v); }
  // Bytes 0..255 of the rows.
  HQQ_INLINE static Floats from_bytes(const std::uint8_t* p) {
    std::uint32_t four;
    std::memcpy(&four, p, 4);
    const uint16x8_t halves = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)));
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(halves)));
  }
  HQQ_INLINE static Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
  HQQ_INLINE static Floats sub(Floats a, Floats b) { return vsubq_f32(a, b); }
  HQQ_INLINE static Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
  // a * b + c
  HQQ_INLINE static Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  // c - a * b
  HQQ_INLINE static Floats fnma(Floats a, Floats b, Floats c) { return vfmsq_f32(c, a, b); }

  static constexpr int dot_class(int max_code) { return max_code == 255 ? 255 : 63; }

  // Sums of codes (0..kMaxCode) times int8 codes of x over up to 16 fields, in their order. The
  // result is sum ((code - kOffset) * x).
  template <int kMaxCode>
  struct Dot {
    static constexpr int kOffset = kMaxCode == 255 ? 128 : 0;
    // Two sums of each row: rows 0 and 1, and rows 2 and 3.
    Ints low, high;
    template <int kField>
    HQQ_INLINE void add(Bytes codes, Bytes x) {
      if constexpr (kOffset != 0) codes = veorq_u8(codes, vdupq_n_u8(kOffset));
      const int8x16_t a = vreinterpretq_s8_u8(codes), b = vreinterpretq_s8_u8(x);
      const int16x8_t low_products = vmull_s8(vget_low_s8(a), vget_low_s8(b));
      const int16x8_t high_products = vmull_high_s8(a, b);
      if constexpr (kField == 0) {
        low = vpaddlq_s16(low_products);
        high = vpaddlq_s16(high_products);
      } else {
        low = vpadalq_s16(low, low_products);
        high = vpadalq_s16(high, high_products);
      }
    }
    template <int kFields>
    HQQ_INLINE Ints sum() const {
      return vpaddq_s32(low, high);
    }
  };
};

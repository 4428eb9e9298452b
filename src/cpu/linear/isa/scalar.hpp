// No instruction set in particular: plain C++, four rows at a time. Included inside a namespace.
// The functions are not inlined: this is for machines without a better set, and for tests.

struct Isa {
  static constexpr int kRows = 4;
  struct Bytes {
    using Lane = std::uint8_t;
    std::uint8_t v[kRows * kFieldCols];
  };
  struct Ints {
    using Lane = std::int32_t;
    std::int32_t v[kRows];
  };
  struct Floats {
    using Lane = float;
    float v[kRows];
  };

  template <class V, class Make>
  HQQ_INLINE static V make(Make make_lane) {
    V out;
    for (int i = 0; i < static_cast<int>(sizeof(out.v) / sizeof(out.v[0])); ++i) {
      out.v[i] = static_cast<typename V::Lane>(make_lane(i));
    }
    return out;
  }

  static Bytes load(const std::uint8_t* p) {
    return make<Bytes>([&](int i) { return p[i]; });
  }
  static void store(std::uint8_t* p, Bytes a) { std::memcpy(p, a.v, sizeof(a.v)); }
  template <int kMask>
  static Bytes and_mask(Bytes a) {
    return make<Bytes>([&](int i) { return a.v[i] & kMask; });
  }
  template <int kShift>
  static Bytes shift_right(Bytes a) {
    return make<Bytes>([&](int i) { return a.v[i] >> kShift; });
  }
  static Bytes or_(Bytes a, Bytes b) {
    return make<Bytes>([&](int i) { return a.v[i] | b.v[i]; });
  }
  // Four codes of x, for every row.
  static Bytes broadcast4(const std::int8_t* p) {
    return make<Bytes>([&](int i) { return p[i % kFieldCols]; });
  }

  // Byte kByte of every row, times 256^kByte except for the last byte (copy_x, `shifted`).
  template <int kByte>
  static Floats byte_shifted(Bytes a) {
    return make<Floats>(
        [&](int r) { return a.v[r * kFieldCols + kByte] << (kByte == 3 ? 0 : 8 * kByte); });
  }
  template <int kByte>
  static Floats byte(Bytes a) {
    return make<Floats>([&](int r) { return a.v[r * kFieldCols + kByte]; });
  }

  static Floats zero() { return set(0.0f); }
  static Floats set(float x) {
    return make<Floats>([&](int) { return x; });
  }
  static Floats broadcast(const float* p) { return set(*p); }
  static Floats load(const float* p) {
    return make<Floats>([&](int r) { return p[r]; });
  }
  static Floats load(const std::uint16_t* f16) {
    return make<Floats>([&](int r) { return core::scalar::f16_bits_to_f32(f16[r]); });
  }
  static void store(float* p, Floats a) { std::memcpy(p, a.v, sizeof(a.v)); }
  static Ints zero_ints() {
    return make<Ints>([](int) { return 0; });
  }
  // The larger absolute value, as the bits of a float: their order is that of the values, NaN last.
  static Ints max_abs_bits(Ints largest, Floats a) {
    return make<Ints>([&](int r) {
      std::int32_t bits;
      std::memcpy(&bits, a.v + r, sizeof(bits));
      bits &= 0x7FFFFFFF;
      return bits > largest.v[r] ? bits : largest.v[r];
    });
  }
  static float largest_lane(Ints bits) {
    std::int32_t largest = 0;
    for (std::int32_t lane : bits.v) largest = lane > largest ? lane : largest;
    float value;
    std::memcpy(&value, &largest, sizeof(value));
    return value;
  }
  static std::int32_t sum_lanes(Ints a) { return a.v[0] + a.v[1] + a.v[2] + a.v[3]; }
  // To nearest, ties to even, for |x| < 2^22: the bits below the point leave the sum. NaN: 0, so
  // that sums do not overflow.
  static Ints round(Floats a) {
    return make<Ints>([&](int r) {
      if (!(a.v[r] >= -128.0f && a.v[r] <= 128.0f)) return 0;
      const float shifted = a.v[r] + 12582912.0f;  // 1.5 * 2^23
      std::int32_t bits;
      std::memcpy(&bits, &shifted, sizeof(bits));
      return static_cast<int>(bits - 0x4B400000);
    });
  }
  // The low bytes.
  static void store_codes(std::int8_t* p, Ints a) {
    for (int r = 0; r < kRows; ++r) p[r] = static_cast<std::int8_t>(a.v[r]);
  }
  static Ints add_ints(Ints a, Ints b) {
    return make<Ints>([&](int r) { return a.v[r] + b.v[r]; });
  }
  static Floats from(Ints a) {
    return make<Floats>([&](int r) { return a.v[r]; });
  }
  // Bytes 0..255 of the rows.
  static Floats from_bytes(const std::uint8_t* p) {
    return make<Floats>([&](int r) { return p[r]; });
  }
  static Floats add(Floats a, Floats b) {
    return make<Floats>([&](int r) { return a.v[r] + b.v[r]; });
  }
  static Floats sub(Floats a, Floats b) {
    return make<Floats>([&](int r) { return a.v[r] - b.v[r]; });
  }
  static Floats mul(Floats a, Floats b) {
    return make<Floats>([&](int r) { return a.v[r] * b.v[r]; });
  }
  // a * b + c
  static Floats fma(Floats a, Floats b, Floats c) { return add(mul(a, b), c); }
  // c - a * b
  static Floats fnma(Floats a, Floats b, Floats c) { return sub(c, mul(a, b)); }

  static constexpr int dot_class(int) { return 255; }

  // Sums of codes times int8 codes of x over up to 16 fields, in their order.
  template <int kMaxCode>
  struct Dot {
    static constexpr int kOffset = 0;
    Ints wide;
    template <int kField>
    void add(Bytes codes, Bytes x) {
      if (kField == 0) wide = zero_ints();
      wide = accumulate(wide, codes, x);
    }
    template <int kFields>
    Ints sum() const {
      return wide;
    }
  };
  static Ints accumulate(Ints sum, Bytes codes, Bytes x) {
    for (int i = 0; i < kRows * kFieldCols; ++i) {
      sum.v[i / kFieldCols] += codes.v[i] * static_cast<std::int8_t>(x.v[i]);
    }
    return sum;
  }
};

// AVX-512 (F, BW, DQ, VL): all sixteen rows in a register. Included inside a namespace;
// HQQ_ISA_VNNI: with the byte dot product.

struct Isa {
  static constexpr int kRows = 16;
  using Bytes = __m512i;  // [16 rows][4 columns]
  using Ints = __m512i;   // [16 rows]
  using Floats = __m512;  // [16 rows]

  HQQ_INLINE static Bytes load(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
  HQQ_INLINE static void store(std::uint8_t* p, Bytes v) { _mm512_storeu_si512(p, v); }
  template <int kMask>
  HQQ_INLINE static Bytes and_mask(Bytes v) {
    return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(kMask)));
  }
  template <int kShift>
  HQQ_INLINE static Bytes shift_right(Bytes v) {
    return _mm512_srli_epi16(v, kShift);
  }
  HQQ_INLINE static Bytes or_(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
  // Four codes of x, for every row.
  HQQ_INLINE static Bytes broadcast4(const std::int8_t* p) {
    std::int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }

  // Byte kByte of every row, times 256^kByte except for the last byte: a mask is cheaper than a
  // shift, and the power of two is in x (copy_x, `shifted`).
  template <int kByte>
  HQQ_INLINE static Floats byte_shifted(Bytes v) {
    if constexpr (kByte == 3) return _mm512_cvtepi32_ps(_mm512_srli_epi32(v, 24));
    return _mm512_cvtepi32_ps(_mm512_and_si512(v, _mm512_set1_epi32(255 << (8 * kByte))));
  }
  template <int kByte>
  HQQ_INLINE static Floats byte(Bytes v) {
    if constexpr (kByte == 3) return _mm512_cvtepi32_ps(_mm512_srli_epi32(v, 24));
    return _mm512_cvtepi32_ps(
        _mm512_and_si512(_mm512_srli_epi32(v, 8 * kByte), _mm512_set1_epi32(255)));
  }

  HQQ_INLINE static Floats zero() { return _mm512_setzero_ps(); }
  HQQ_INLINE static Floats set(float x) { return _mm512_set1_ps(x); }
  HQQ_INLINE static Floats broadcast(const float* p) { return _mm512_set1_ps(*p); }
  HQQ_INLINE static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  HQQ_INLINE static Floats load(const std::uint16_t* f16) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(f16)));
  }
  HQQ_INLINE static void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  HQQ_INLINE static Ints zero_ints() { return _mm512_setzero_si512(); }
  // The larger absolute value, as the bits of a float: their order is that of the values, NaN last.
  HQQ_INLINE static Ints max_abs_bits(Ints largest, Floats v) {
    const Ints bits = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF));
    return _mm512_max_epi32(largest, bits);
  }
  HQQ_INLINE static float largest_lane(Ints bits) {
    const std::int32_t largest = _mm512_reduce_max_epi32(bits);
    float value;
    std::memcpy(&value, &largest, 4);
    return value;
  }
  // Not _mm512_reduce_add_epi32: GCC adds the last lanes as signed integers of C, whose sums must
  // not overflow, and rows with NaN have lanes of INT_MIN. Additions of vectors wrap around.
  HQQ_INLINE static std::int32_t sum_lanes(Ints ints) {
    const __m256i half =
        _mm256_add_epi32(_mm512_castsi512_si256(ints), _mm512_extracti64x4_epi64(ints, 1));
    __m128i v = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0x4E));
    v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0xB1));
    return _mm_cvtsi128_si32(v);
  }
  // To nearest, ties to even.
  HQQ_INLINE static Ints round(Floats v) { return _mm512_cvtps_epi32(v); }
  // The low bytes.
  HQQ_INLINE static void store_codes(std::int8_t* p, Ints v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
  }
  HQQ_INLINE static Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  HQQ_INLINE static Floats from(Ints v) { return _mm512_cvtepi32_ps(v); }
  // Bytes 0..255 of the rows.
  HQQ_INLINE static Floats from_bytes(const std::uint8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  HQQ_INLINE static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  HQQ_INLINE static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  HQQ_INLINE static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  // a * b + c
  HQQ_INLINE static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  // c - a * b
  HQQ_INLINE static Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }

#ifdef HQQ_ISA_VNNI
  static constexpr int dot_class(int) { return 255; }
#else
  // Panels are instantiated once for all codes whose sums need no widening inside a block.
  static constexpr int dot_class(int max_code) { return max_code < 7 ? 7 : max_code; }
#endif

  // Sums of codes (0..kMaxCode) times int8 codes of x over up to 16 fields, in their order. The
  // result is sum ((code - kOffset) * x).
  template <int kMaxCode>
  struct Dot {
#ifdef HQQ_ISA_VNNI
    static constexpr int kOffset = 0;
    Ints wide;
    template <int kField>
    HQQ_INLINE void add(Bytes codes, Bytes x) {
      if constexpr (kField == 0) wide = _mm512_setzero_si512();
      wide = _mm512_dpbusd_epi32(wide, codes, x);
    }
    template <int kFields>
    HQQ_INLINE Ints sum() const {
      return wide;
    }
#else
    static constexpr int kOffset = kMaxCode == 255 ? 128 : 0;
    // Products of two neighbours that an int16 sum takes.
    static constexpr int kRun = kMaxCode == 255 ? 1 : 32767 / (2 * 127 * kMaxCode);
    Ints narrow, wide;
    template <int kField>
    HQQ_INLINE void add(Bytes codes, Bytes x) {
      Ints products;
      if constexpr (kMaxCode == 255) {
        // Bytes -128..127: |code| as unsigned, its sign moved to x. 2 * 128 * 127 fits int16.
        const Bytes centered = _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
        const Bytes signed_x =
            _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(centered), _mm512_setzero_si512(), x);
        products = _mm512_maddubs_epi16(_mm512_abs_epi8(centered), signed_x);
      } else {
        products = _mm512_maddubs_epi16(codes, x);
      }
      if constexpr (kField % kRun == 0) {
        if constexpr (kField > 0) widen<kField <= kRun>();
        narrow = products;
      } else {
        narrow = _mm512_add_epi16(narrow, products);
      }
      HQQ_PIN(narrow);
    }
    template <bool kFirst>
    HQQ_INLINE void widen() {
      const Ints sums = _mm512_madd_epi16(narrow, _mm512_set1_epi16(1));
      wide = kFirst ? sums : _mm512_add_epi32(wide, sums);
    }
    // After kFields fields.
    template <int kFields>
    HQQ_INLINE Ints sum() {
      widen<kFields <= kRun>();
      return wide;
    }
#endif
  };
};

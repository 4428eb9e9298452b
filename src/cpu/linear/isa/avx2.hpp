// AVX2 with FMA and F16C: eight rows in a register. Included inside a namespace; HQQ_ISA_VNNI: with
// the byte dot product of AVX-VNNI.

struct Isa {
  static constexpr int kRows = 8;
  using Bytes = __m256i;  // [8 rows][4 columns]
  using Ints = __m256i;   // [8 rows]
  using Floats = __m256;  // [8 rows]

  HQQ_INLINE static Bytes load(const std::uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  HQQ_INLINE static void store(std::uint8_t* p, Bytes v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  }
  template <int kMask>
  HQQ_INLINE static Bytes and_mask(Bytes v) {
    return _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(kMask)));
  }
  template <int kShift>
  HQQ_INLINE static Bytes shift_right(Bytes v) {
    return _mm256_srli_epi16(v, kShift);
  }
  HQQ_INLINE static Bytes or_(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
  // Four codes of x, for every row.
  HQQ_INLINE static Bytes broadcast4(const std::int8_t* p) {
    std::int32_t four;
    std::memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }

  // Byte kByte of every row, times 256^kByte except for the last byte: a mask is cheaper than a
  // shift, and the power of two is in x (copy_x, `shifted`).
  template <int kByte>
  HQQ_INLINE static Floats byte_shifted(Bytes v) {
    if constexpr (kByte == 3) return _mm256_cvtepi32_ps(_mm256_srli_epi32(v, 24));
    return _mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32(255 << (8 * kByte))));
  }
  template <int kByte>
  HQQ_INLINE static Floats byte(Bytes v) {
    if constexpr (kByte == 3) return _mm256_cvtepi32_ps(_mm256_srli_epi32(v, 24));
    return _mm256_cvtepi32_ps(
        _mm256_and_si256(_mm256_srli_epi32(v, 8 * kByte), _mm256_set1_epi32(255)));
  }

  HQQ_INLINE static Floats zero() { return _mm256_setzero_ps(); }
  HQQ_INLINE static Floats set(float x) { return _mm256_set1_ps(x); }
  HQQ_INLINE static Floats broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  HQQ_INLINE static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  HQQ_INLINE static Floats load(const std::uint16_t* f16) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(f16)));
  }
  HQQ_INLINE static void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  HQQ_INLINE static Ints zero_ints() { return _mm256_setzero_si256(); }
  // The larger absolute value, as the bits of a float: their order is that of the values, NaN last.
  HQQ_INLINE static Ints max_abs_bits(Ints largest, Floats v) {
    const Ints bits = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7FFFFFFF));
    return _mm256_max_epi32(largest, bits);
  }
  HQQ_INLINE static float largest_lane(Ints bits) {
    __m128i v = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    v = _mm_max_epi32(v, _mm_shuffle_epi32(v, 0x4E));
    v = _mm_max_epi32(v, _mm_shuffle_epi32(v, 0xB1));
    return _mm_cvtss_f32(_mm_castsi128_ps(v));
  }
  HQQ_INLINE static std::int32_t sum_lanes(Ints ints) {
    __m128i v = _mm_add_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
    v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0x4E));
    v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0xB1));
    return _mm_cvtsi128_si32(v);
  }
  // To nearest, ties to even.
  HQQ_INLINE static Ints round(Floats v) { return _mm256_cvtps_epi32(v); }
  // The low bytes.
  HQQ_INLINE static void store_codes(std::int8_t* p, Ints v) {
    const __m256i low_bytes = _mm256_shuffle_epi8(
        v, _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8,
                            12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p),
                     _mm_unpacklo_epi32(_mm256_castsi256_si128(low_bytes),
                                        _mm256_extracti128_si256(low_bytes, 1)));
  }
  HQQ_INLINE static Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  HQQ_INLINE static Floats from(Ints v) { return _mm256_cvtepi32_ps(v); }
  // Bytes 0..255 of the rows.
  HQQ_INLINE static Floats from_bytes(const std::uint8_t* p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  HQQ_INLINE static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  HQQ_INLINE static Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  HQQ_INLINE static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  // a * b + c
  HQQ_INLINE static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  // c - a * b
  HQQ_INLINE static Floats fnma(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }

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
      if constexpr (kField == 0) wide = _mm256_setzero_si256();
      wide = _mm256_dpbusd_avx_epi32(wide, codes, x);
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
        const Bytes centered = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
        products = _mm256_maddubs_epi16(_mm256_abs_epi8(centered), _mm256_sign_epi8(x, centered));
      } else {
        products = _mm256_maddubs_epi16(codes, x);
      }
      if constexpr (kField % kRun == 0) {
        if constexpr (kField > 0) widen<kField <= kRun>();
        narrow = products;
      } else {
        narrow = _mm256_add_epi16(narrow, products);
      }
      HQQ_PIN(narrow);
    }
    template <bool kFirst>
    HQQ_INLINE void widen() {
      const Ints sums = _mm256_madd_epi16(narrow, _mm256_set1_epi16(1));
      wide = kFirst ? sums : _mm256_add_epi32(wide, sums);
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

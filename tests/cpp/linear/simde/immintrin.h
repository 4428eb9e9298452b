// Stands in for the compiler's <immintrin.h>: the same intrinsics as plain C++ (SIMDe, Debian
// package libsimde-dev), so that kernels for AVX-512 and VNNI run on any machine. Slow, and exact.
#pragma once

// Inlined, a kernel takes minutes to compile.
#define SIMDE_NO_INLINE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
// Clang has a type of this name by now, and not the one of SIMDe 0.7.4.
#define __m128bh hqq_simde_m128bh
#include <simde/x86/avx512.h>
#undef __m128bh
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>

// What SIMDe 0.7.4 lacks or names wrongly, from the descriptions in Intel's guide.
#undef _mm256_dpbusd_avx_epi32
#undef _mm512_cvtepi32_epi8
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_epi32
#undef _mm512_madd_epi16
#undef _mm512_reduce_add_epi32
#undef _mm512_reduce_max_epi32

namespace hqq_simde {

using Ints = std::array<std::int32_t, 16>;
using Floats = std::array<float, 16>;

template <class To, class From, class Convert>
To map(const From& in, Convert convert) {
  To out;
  for (std::size_t i = 0; i < out.size(); ++i) {
    out[i] = static_cast<typename To::value_type>(convert(in[i]));
  }
  return out;
}

}  // namespace hqq_simde

inline __m256i _mm256_dpbusd_avx_epi32(__m256i sum, __m256i a, __m256i b) {
  auto sums = std::bit_cast<std::array<std::int32_t, 8>>(sum);
  const auto unsigned_bytes = std::bit_cast<std::array<std::uint8_t, 32>>(a);
  const auto signed_bytes = std::bit_cast<std::array<std::int8_t, 32>>(b);
  for (std::size_t i = 0; i < 32; ++i) sums[i / 4] += unsigned_bytes[i] * signed_bytes[i];
  return std::bit_cast<__m256i>(sums);
}

inline __m128i _mm512_cvtepi32_epi8(__m512i v) {
  return std::bit_cast<__m128i>(hqq_simde::map<std::array<std::uint8_t, 16>>(
      std::bit_cast<hqq_simde::Ints>(v), [](std::int32_t x) { return x & 255; }));
}

inline __m512i _mm512_cvtepu8_epi32(__m128i v) {
  return std::bit_cast<__m512i>(hqq_simde::map<hqq_simde::Ints>(
      std::bit_cast<std::array<std::uint8_t, 16>>(v), [](std::int32_t x) { return x; }));
}

inline __m512 _mm512_cvtepi32_ps(__m512i v) {
  return std::bit_cast<__m512>(hqq_simde::map<hqq_simde::Floats>(std::bit_cast<hqq_simde::Ints>(v),
                                                                 [](std::int32_t x) { return x; }));
}

// To nearest, ties to even; what does not fit is the smallest integer.
inline __m512i _mm512_cvtps_epi32(__m512 v) {
  return std::bit_cast<__m512i>(
      hqq_simde::map<hqq_simde::Ints>(std::bit_cast<hqq_simde::Floats>(v), [](float x) {
        const float rounded = std::nearbyint(x);
        return rounded >= -0x1p31f && rounded < 0x1p31f ? static_cast<std::int32_t>(rounded)
                                                        : std::numeric_limits<std::int32_t>::min();
      }));
}

inline __m512 _mm512_cvtph_ps(__m256i v) {
  const auto halves = std::bit_cast<std::array<__m128i, 2>>(v);
  return std::bit_cast<__m512>(
      std::array<__m256, 2>{_mm256_cvtph_ps(halves[0]), _mm256_cvtph_ps(halves[1])});
}

inline __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
  const auto as = std::bit_cast<std::array<__m256i, 2>>(a);
  const auto bs = std::bit_cast<std::array<__m256i, 2>>(b);
  return std::bit_cast<__m512i>(
      std::array<__m256i, 2>{_mm256_madd_epi16(as[0], bs[0]), _mm256_madd_epi16(as[1], bs[1])});
}

inline int _mm512_reduce_add_epi32(__m512i v) {
  const auto lanes = std::bit_cast<std::array<std::uint32_t, 16>>(v);
  return static_cast<int>(std::accumulate(lanes.begin(), lanes.end(), 0u));
}

inline int _mm512_reduce_max_epi32(__m512i v) {
  const auto lanes = std::bit_cast<hqq_simde::Ints>(v);
  return *std::max_element(lanes.begin(), lanes.end());
}

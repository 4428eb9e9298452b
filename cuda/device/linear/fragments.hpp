// From the words of a tile to A operands of mma.m16n8k16 in registers.
#pragma once

#include <cstdint>

#include "cuda/device/format/tile.hpp"
#include "cuda/device/simt/simt.hpp"

namespace hqq::cuda::device {

// kBase: a power of two whose last mantissa bit is 1, so that base | code is base + code.
template <class T>
struct Half;
template <>
struct Half<F16> {
  static constexpr int kMantissaBits = 10;
  static constexpr float kBase = 1024.0f;
  static constexpr std::uint32_t kBaseBits = 0x64006400u;
  static constexpr std::uint32_t kOnes = 0x3C003C00u;
  // Codes without a base are subnormal numbers, multiples of this. mma and fma keep them.
  static constexpr bool kSubnormalCodes = true;
  static constexpr float kUnit = 0x1p-24f;
};
template <>
struct Half<BF16> {
  static constexpr int kMantissaBits = 7;
  static constexpr float kBase = 128.0f;
  static constexpr std::uint32_t kBaseBits = 0x43004300u;
  static constexpr std::uint32_t kOnes = 0x3F803F80u;
  // As subnormal numbers of bfloat16 they would vanish in products with x in float32.
  static constexpr bool kSubnormalCodes = false;
  static constexpr float kUnit = 1.0f;
};

template <class T>
__device__ __forceinline__ std::uint32_t twice(float x) {
  return simt::pack2<T>(x, x);
}

inline constexpr int kAndOr = 0xEA;  // lop3: (a & b) | c

template <int kShift>
__device__ __forceinline__ std::uint32_t shift_right(std::uint32_t w) {
  if constexpr (kShift >= 0) {
    return w >> kShift;
  } else {
    return w << -kShift;
  }
}

// One lane's words of a tile.
template <class T, int kLow, int kHigh>
class Codes {
 public:
  static constexpr int kBits = kLow + kHigh;
  // Bits by which codes of rows g + 8 are left where they are, above those of row g.
  static constexpr int kOddShift = 2 * kLow + kHigh <= Half<T>::kMantissaBits ? kLow : 0;
  // Eight bits are one too many for bfloat16's mantissa: two parts are added up.
  static constexpr bool kTwoParts = kBits > Half<T>::kMantissaBits;

  // What raw() gives for code q: (q unit 2^shift + offset), with shift = kOddShift for rows g + 8,
  // else 0.
  static constexpr float kUnit = kTwoParts ? 1.0f : Half<T>::kUnit;
  static constexpr float kOffset = kTwoParts || Half<T>::kSubnormalCodes ? 0.0f : Half<T>::kBase;

  __device__ __forceinline__ void load(const unsigned char* tile, int lane) {
    load_plane<kLow>(tile, lane, low_);
    if constexpr (kHigh > 0) load_plane<kHigh>(tile + tile_bytes(kLow), lane, high_);
  }

  // The cheapest exact 16-bit floats, for sums that are scaled afterwards.
  template <int kFragment, int kStep>
  __device__ __forceinline__ void raw(std::uint32_t (&a)[4]) const {
    each<kFragment, kStep, !Half<T>::kSubnormalCodes>(a);
  }

  // code - part for a[0..3]; `minus_part` holds -part twice or for two columns, each an integer in
  // the range of the codes, after prepare().
  template <int kFragment, int kStep>
  __device__ __forceinline__ void centered(std::uint32_t (&a)[4],
                                           const std::uint32_t (&minus_part)[4]) const {
    each<kFragment, kStep, true>(a);
    if constexpr (kTwoParts) {
      for (int i = 0; i < 4; ++i) a[i] = T::fma2(a[i], Half<T>::kOnes, minus_part[i]);
    } else {
      const std::uint32_t odd_unit = twice<T>(1.0f / (1 << kOddShift));
      for (int i = 0; i < 4; ++i) {
        a[i] = T::fma2(a[i], i % 2 == 0 ? Half<T>::kOnes : odd_unit, minus_part[i]);
      }
    }
  }
  // -part as float for rows g (odd 0) or g + 8, with the base taken off as well: still exact.
  static __device__ __forceinline__ float prepare(float minus_part, int odd) {
    if constexpr (kTwoParts) return minus_part;
    return minus_part - (odd != 0 ? Half<T>::kBase / (1 << kOddShift) : Half<T>::kBase);
  }
  static __device__ __forceinline__ std::uint32_t prepare2(std::uint32_t minus_part, int odd) {
    if constexpr (kTwoParts) return minus_part;
    const float base = odd != 0 ? Half<T>::kBase / (1 << kOddShift) : Half<T>::kBase;
    return T::fma2(minus_part, Half<T>::kOnes, twice<T>(-base));
  }

 private:
  template <int kBitsOfPlane>
  static __device__ __forceinline__ void load_plane(
      const unsigned char* plane, int lane, std::uint32_t (&words)[lane_words(kBitsOfPlane)]) {
    if constexpr (chunk_words(kBitsOfPlane) == 2) {
      const uint2 w =
          ld_shared(reinterpret_cast<const uint2*>(plane + chunk_offset(kBitsOfPlane, 0, lane)));
      words[0] = w.x, words[1] = w.y;
    } else {
#pragma unroll
      for (int chunk = 0; chunk < lane_words(kBitsOfPlane) / 4; ++chunk) {
        const uint4 w = ld_shared(
            reinterpret_cast<const uint4*>(plane + chunk_offset(kBitsOfPlane, chunk, lane)));
        words[4 * chunk] = w.x, words[4 * chunk + 1] = w.y;
        words[4 * chunk + 2] = w.z, words[4 * chunk + 3] = w.w;
      }
    }
  }

  template <int kFragment, int kStep, bool kWithBase>
  __device__ __forceinline__ void each(std::uint32_t (&a)[4]) const {
    a[0] = pair<kFragment, 2 * kStep, 0, kWithBase>();
    a[1] = pair<kFragment, 2 * kStep, 1, kWithBase>();
    a[2] = pair<kFragment, 2 * kStep + 1, 0, kWithBase>();
    a[3] = pair<kFragment, 2 * kStep + 1, 1, kWithBase>();
  }

  // The codes of two columns, as bits of 16-bit floats.
  template <int kFragment, int kPair, int kOdd, bool kWithBase>
  __device__ __forceinline__ std::uint32_t pair() const {
    constexpr int kWord = kFragment * kLow + kPair / pairs_per_word(kLow);
    // Rows g + 8 share the shifted word of rows g, unless their codes would leave the mantissa.
    constexpr int kShiftRow = kOddShift > 0 ? 0 : kOdd;
    constexpr int kPlace = kOddShift * kOdd;
    constexpr int kShift = field_bit(kLow, kLow, kPair % pairs_per_word(kLow), kShiftRow);
    const std::uint32_t low = shift_right<kShift>(low_[kWord]);
    constexpr std::uint32_t kBase = Half<T>::kBaseBits;

    if constexpr (kTwoParts) {
      // 128 + (q & 127), and 128 or 256 by the exponent.
      const std::uint32_t small = simt::lop3<kAndOr>(low, 0x007F007Fu, kBase);
      const std::uint32_t large = simt::lop3<kAndOr>(low, 0x00800080u, kBase);
      const std::uint32_t minus_256 = 0xC380C380u;
      return T::fma2(small, Half<T>::kOnes, T::fma2(large, Half<T>::kOnes, minus_256));
    } else {
      constexpr std::uint32_t kLowMask = 0x00010001u * (((1u << kLow) - 1) << kPlace);
      std::uint32_t value = kWithBase ? simt::lop3<kAndOr>(low, kLowMask, kBase) : low & kLowMask;
      if constexpr (kHigh > 0) {
        constexpr int kHighWord = kFragment * kHigh + kPair / pairs_per_word(kHigh);
        constexpr int kHighShift =
            field_bit(kHigh, kLow, kPair % pairs_per_word(kHigh), kShiftRow) - kLow;
        constexpr std::uint32_t kHighMask = 0x00010001u * (((1u << kHigh) - 1) << (kLow + kPlace));
        value = simt::lop3<kAndOr>(shift_right<kHighShift>(high_[kHighWord]), kHighMask, value);
      }
      return value;
    }
  }

  std::uint32_t low_[lane_words(kLow)];
  std::uint32_t high_[kHigh > 0 ? lane_words(kHigh) : 1];
};

}  // namespace hqq::cuda::device

// The vocabulary of cuda/device/simt/simt.hpp on the CPU: the same names as in
// cuda/device/simt/gpu.hpp, checked.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "hqq/core/math.hpp"
#include "tests/cuda/simt/engine.hpp"

// ---- What CUDA itself names.

namespace hqq::simt {

// threadIdx and its like: objects whose members are read from the thread that runs.
template <Dim3 ThreadView::* kIndex, unsigned Dim3::* kAxis>
struct Coordinate {
  operator unsigned() const { return (this_thread().*kIndex).*kAxis; }
};
template <Dim3 ThreadView::* kIndex>
struct Coordinates {
  Coordinate<kIndex, &Dim3::x> x;
  Coordinate<kIndex, &Dim3::y> y;
  Coordinate<kIndex, &Dim3::z> z;
};

template <class T>
struct ShuffleOperands {
  T value;
  int source;
};

template <class T>
T shuffle(unsigned mask, const char* name, T value, int source, const Location& at) {
  ShuffleOperands<T> mine{value, source};
  warp_step(
      mask, name, &mine,
      [](void* const(&lanes)[kWarpSize]) {
        T values[kWarpSize] = {};
        for (int l = 0; l < kWarpSize; ++l) {
          if (lanes[l] != nullptr) values[l] = static_cast<ShuffleOperands<T>*>(lanes[l])->value;
        }
        for (int l = 0; l < kWarpSize; ++l) {
          if (lanes[l] == nullptr) continue;
          auto& operands = *static_cast<ShuffleOperands<T>*>(lanes[l]);
          if (lanes[operands.source] == nullptr)
            operands.source = -1;
          else
            operands.value = values[operands.source];
        }
      },
      at);
  if (mine.source < 0) fail(std::string(name) + " reads a lane that is not in the mask");
  return mine.value;
}

inline int lane_index() {
  const ThreadView& v = this_thread();
  return static_cast<int>(
      (v.thread.x + v.block_size.x * (v.thread.y + v.block_size.y * v.thread.z)) % kWarpSize);
}

inline unsigned ballot(unsigned mask, bool predicate, const Location& at) {
  struct Operands {
    unsigned predicate, result;
  } mine{predicate ? 1u : 0u, 0};
  warp_step(
      mask, "vote", &mine,
      [](void* const(&lanes)[kWarpSize]) {
        unsigned result = 0;
        for (int l = 0; l < kWarpSize; ++l) {
          if (lanes[l] != nullptr) result |= static_cast<Operands*>(lanes[l])->predicate << l;
        }
        for (void* lane : lanes) {
          if (lane != nullptr) static_cast<Operands*>(lane)->result = result;
        }
      },
      at);
  return mine.result;
}

template <class T>
T exchange_global(T* p, T value) {
  check_global(p, sizeof(T), sizeof(T));
  const T old = *p;
  *p = value;
  return old;
}

}  // namespace hqq::simt

inline constexpr hqq::simt::Coordinates<&hqq::simt::ThreadView::thread> threadIdx{};
inline constexpr hqq::simt::Coordinates<&hqq::simt::ThreadView::block> blockIdx{};
inline constexpr hqq::simt::Coordinates<&hqq::simt::ThreadView::block_size> blockDim{};
inline constexpr hqq::simt::Coordinates<&hqq::simt::ThreadView::grid_size> gridDim{};

#define HQQ_SIMT_HERE ::hqq::simt::Location at = ::hqq::simt::Location::current()

inline void __syncthreads(HQQ_SIMT_HERE) { hqq::simt::block_barrier(at); }
inline void __syncwarp(unsigned mask = hqq::simt::kFullMask, HQQ_SIMT_HERE) {
  hqq::simt::warp_barrier(mask, at);
}
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, HQQ_SIMT_HERE) {
  return hqq::simt::shuffle(mask, "__shfl_sync", value, source % 32, at);
}
// Lanes whose source lies outside the warp keep their own value.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, HQQ_SIMT_HERE) {
  return hqq::simt::shuffle(mask, "__shfl_xor_sync", value, hqq::simt::lane_index() ^ bits, at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, HQQ_SIMT_HERE) {
  const int lane = hqq::simt::lane_index();
  const int source = lane + static_cast<int>(delta);
  return hqq::simt::shuffle(mask, "__shfl_down_sync", value, source < 32 ? source : lane, at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, HQQ_SIMT_HERE) {
  const int lane = hqq::simt::lane_index();
  const int source = lane - static_cast<int>(delta);
  return hqq::simt::shuffle(mask, "__shfl_up_sync", value, source >= 0 ? source : lane, at);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, HQQ_SIMT_HERE) {
  return hqq::simt::ballot(mask, predicate, at);
}
inline int __any_sync(unsigned mask, bool predicate, HQQ_SIMT_HERE) {
  return hqq::simt::ballot(mask, predicate, at) != 0 ? 1 : 0;
}
inline int __all_sync(unsigned mask, bool predicate, HQQ_SIMT_HERE) {
  return hqq::simt::ballot(mask, predicate, at) == mask ? 1 : 0;
}

// In global memory only.
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  return hqq::simt::exchange_global(p, static_cast<T>(*p + value));
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> value) {
  return hqq::simt::exchange_global(p, *p < value ? *p : value);
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> value) {
  return hqq::simt::exchange_global(p, *p > value ? *p : value);
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> value) {
  return hqq::simt::exchange_global(p, value);
}

inline float __uint_as_float(unsigned x) {
  return hqq::core::scalar::bits_float(static_cast<int>(x));
}
inline unsigned __float_as_uint(float x) {
  return static_cast<unsigned>(hqq::core::scalar::float_bits(x));
}
inline float __int_as_float(int x) { return hqq::core::scalar::bits_float(x); }
inline int __float_as_int(float x) { return hqq::core::scalar::float_bits(x); }

// ---- What gpu.hpp names.

namespace hqq::simt {

inline unsigned char* shared_memory() { return shared_arena(); }

template <class T>
T ld_shared(const T* p) {
  check_shared(p, sizeof(T), Access::kRead);
  return *p;
}
template <class T>
void st_shared(T* p, T value) {
  check_shared(p, sizeof(T), Access::kWrite);
  *p = value;
}
template <class T>
T ld_global(const T* p) {
  check_global(p, sizeof(T), sizeof(T));
  return *p;
}
template <class T>
T ld_coherent(const T* p) {
  return ld_global(p);
}
template <class T>
void st_global(T* p, T value) {
  check_global(p, sizeof(T), sizeof(T));
  *p = value;
}

inline void cp_async_16(void* shared, const void* global, bool copy = true) {
  copy_async(shared, global, copy);
}
inline void cp_async_commit() { copy_async_commit(); }
template <int kPending>
void cp_async_wait() {
  copy_async_wait(kPending);
}

template <int kTable>
std::uint32_t lop3(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t result = 0;
  for (int i = 0; i < 8; ++i) {
    if ((kTable >> i & 1) == 0) continue;
    result |= ((i & 4) != 0 ? a : ~a) & ((i & 2) != 0 ? b : ~b) & ((i & 1) != 0 ? c : ~c);
  }
  return result;
}

// A double rounded to a float type with kMantissa stored bits and smallest normal exponent
// kMinExponent.
template <int kMantissa, int kMinExponent>
float round_once(double x) {
  if (x == 0.0 || !std::isfinite(x)) return static_cast<float>(x);
  const int exponent = std::max(std::ilogb(x), kMinExponent);
  const double quantum = std::ldexp(1.0, exponent - kMantissa);
  return static_cast<float>(std::rint(x / quantum) * quantum);
}

template <class T>
std::uint32_t fma_pair(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto half = [&](std::uint32_t pair) {
      return static_cast<double>(T::to_float(static_cast<std::uint16_t>(pair >> shift)));
    };
    result |= static_cast<std::uint32_t>(T::from_double(half(a) * half(b) + half(c))) << shift;
  }
  return result;
}

struct F16 {
  static float to_float(std::uint16_t bits) { return core::scalar::f16_bits_to_f32(bits); }
  static std::uint16_t from_float(float x) { return core::scalar::f32_to_f16_bits(x); }
  static std::uint16_t from_double(double x) { return from_float(round_once<10, -14>(x)); }
  static std::uint32_t fma2(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
    return fma_pair<F16>(a, b, c);
  }
};
struct BF16 {
  static float to_float(std::uint16_t bits) { return core::scalar::bf16_bits_to_f32(bits); }
  static std::uint16_t from_float(float x) { return core::scalar::f32_to_bf16_bits(x); }
  static std::uint16_t from_double(double x) { return from_float(round_once<7, -126>(x)); }
  static std::uint32_t fma2(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
    return fma_pair<BF16>(a, b, c);
  }
};

template <class T>
std::uint32_t pack2(float low, float high) {
  return T::from_float(low) | static_cast<std::uint32_t>(T::from_float(high)) << 16;
}

template <class T>
struct MmaOperands {
  float* d;
  const std::uint32_t* a;
  const std::uint32_t* b;
  // Element i (0 or 1) of a pair.
  static float part(std::uint32_t pair, int i) {
    return T::to_float(static_cast<std::uint16_t>(pair >> (16 * i)));
  }
};

template <class T>
void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                  HQQ_SIMT_HERE) {
  using Operands = MmaOperands<T>;
  Operands mine{d, a, b};
  warp_step(
      kFullMask, "mma_m16n8k16", &mine,
      [](void* const(&lanes)[kWarpSize]) {
        float A[16][16], B[16][8];
        for (int l = 0; l < kWarpSize; ++l) {
          const auto& o = *static_cast<Operands*>(lanes[l]);
          const int g = l / 4, t = l % 4;
          for (int i = 0; i < 2; ++i) {
            for (int r = 0; r < 4; ++r) A[g + r % 2 * 8][2 * t + r / 2 * 8 + i] = o.part(o.a[r], i);
            for (int r = 0; r < 2; ++r) B[2 * t + r * 8 + i][g] = o.part(o.b[r], i);
          }
        }
        for (int l = 0; l < kWarpSize; ++l) {
          const auto& o = *static_cast<Operands*>(lanes[l]);
          for (int r = 0; r < 4; ++r) {
            const int row = l / 4 + r / 2 * 8, col = 2 * (l % 4) + r % 2;
            double sum = static_cast<double>(o.d[r]);
            for (int k = 0; k < 16; ++k) {
              sum += static_cast<double>(A[row][k]) * static_cast<double>(B[k][col]);
            }
            o.d[r] = static_cast<float>(sum);
          }
        }
      },
      at);
}

struct MatrixOperands {
  std::uint32_t* r;
  const unsigned char* row;
};

template <int kMatrices>
void load_matrices(std::uint32_t (&r)[kMatrices], const void* row, const Location& at) {
  if (lane_index() < 8 * kMatrices) check_shared(row, 16, Access::kRead);
  MatrixOperands mine{r, static_cast<const unsigned char*>(row)};
  warp_step(
      kFullMask, "ldmatrix", &mine,
      [](void* const(&lanes)[kWarpSize]) {
        for (int l = 0; l < kWarpSize; ++l) {
          const auto& o = *static_cast<MatrixOperands*>(lanes[l]);
          for (int m = 0; m < kMatrices; ++m) {
            const auto& source = *static_cast<MatrixOperands*>(lanes[8 * m + l / 4]);
            std::memcpy(&o.r[m], source.row + 4 * (l % 4), 4);
          }
        }
      },
      at);
}
inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* row, HQQ_SIMT_HERE) {
  load_matrices<4>(r, row, at);
}

}  // namespace hqq::simt

// The vocabulary of simt.hpp on a GPU. Included by simt.hpp only; tests/cuda/simt/device.hpp
// defines the same names on the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace hqq::simt {

// ---- Memory. T: any type of 1, 2, 4, 8 or 16 bytes, aligned to its size (uint2, uint4, float4
// too).

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char hqq_shared_memory[];
  return hqq_shared_memory;
}

template <class T>
__device__ __forceinline__ T ld_shared(const T* p) {
  return *p;
}
template <class T>
__device__ __forceinline__ void st_shared(T* p, T value) {
  *p = value;
}
template <class T>
__device__ __forceinline__ T ld_global(const T* p) {
  return *p;
}
// Written by other blocks of the same launch: past the L1 cache, which is not coherent.
template <class T>
__device__ __forceinline__ T ld_coherent(const T* p) {
  return __ldcg(p);
}
template <class T>
__device__ __forceinline__ void st_global(T* p, T value) {
  *p = value;
}

// ---- Asynchronous copies of 16 bytes from global to shared memory, both aligned to 16. On sm_75
// they are ordinary copies.

__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// Zeros instead of the data where `copy` is false; `global` must be a valid address all the same.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool copy = true) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(copy ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) = copy ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most kPending groups of this thread are under way. Other threads see the data
// after the next barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- Integers.

// kTable: the truth table of f(a, b, c), as f(0xF0, 0xCC, 0xAA).
template <int kTable>
__device__ __forceinline__ std::uint32_t lop3(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}

// ---- 16-bit floats: values as their bits, pairs in 32 bits with the first in the low half.

struct F16 {
  static __device__ __forceinline__ float to_float(std::uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
  }
  static __device__ __forceinline__ std::uint16_t from_float(float x) {
    return __half_as_ushort(__float2half_rn(x));
  }
  // a * b + c, rounded once.
  static __device__ __forceinline__ std::uint32_t fma2(std::uint32_t a, std::uint32_t b,
                                                       std::uint32_t c) {
    std::uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
};

struct BF16 {
  static __device__ __forceinline__ float to_float(std::uint16_t bits) {
    return __uint_as_float(static_cast<std::uint32_t>(bits) << 16);
  }
  static __device__ __forceinline__ std::uint16_t from_float(float x) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
  }
  static __device__ __forceinline__ std::uint32_t fma2(std::uint32_t a, std::uint32_t b,
                                                       std::uint32_t c) {
#if __CUDA_ARCH__ >= 800
    std::uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#else
    const auto half = [&](int shift) {
      const float x = to_float(a >> shift & 0xFFFF), y = to_float(b >> shift & 0xFFFF);
      return static_cast<std::uint32_t>(from_float(x * y + to_float(c >> shift & 0xFFFF))) << shift;
    };
    return half(0) | half(16);
#endif
  }
};

template <class T>
__device__ __forceinline__ std::uint32_t pack2(float low, float high) {
  return T::from_float(low) | static_cast<std::uint32_t>(T::from_float(high)) << 16;
}

// ---- Tensor cores (sm_80), by all lanes of a warp. With g = lane / 4 and t = lane % 4:
// a[0..3]: rows (g, g + 8, g, g + 8), columns (2t, 2t, 2t + 8, 2t + 8) and the next of A [16, 16];
// b[0..1]: rows (2t, 2t + 8) and the next, column g of B [16, 8];
// d[0..3]: rows (g, g, g + 8, g + 8), columns (2t, 2t + 1, 2t, 2t + 1) of D [16, 8].

// d += A B, summed in float32. sm_75 has half as deep a product of F16 and none of BF16.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4],
                                             const std::uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<F16>(float (&d)[4], const std::uint32_t (&a)[4],
                                                  const std::uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  for (int half = 0; half < 2; ++half) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
  }
#endif
}
template <>
__device__ __forceinline__ void mma_m16n8k16<BF16>(float (&d)[4], const std::uint32_t (&a)[4],
                                                   const std::uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

// Four 8 x 8 matrices of 16-bit values: lane l gives the address of row l % 8 of matrix l / 8 (16
// bytes of shared memory, aligned); r[i] gets columns 2t and 2t + 1 of row g of matrix i.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

}  // namespace hqq::simt

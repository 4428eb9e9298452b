// For the kernel templates: everything is inlined into the kernel that uses it, lambdas too, and
// loops over registers are unrolled. HQQ_SMALL_CODE: the compiler decides.
#pragma once

#if defined(_MSC_VER) || defined(HQQ_SMALL_CODE)
#define HQQ_INLINE inline
#define HQQ_INLINE_LAMBDA
#define HQQ_UNROLL
#define HQQ_NO_UNROLL
#define HQQ_PREFETCH(p) static_cast<void>(p)
#define HQQ_OPAQUE(p)
#define HQQ_PIN(v)
#else
#define HQQ_INLINE inline __attribute__((always_inline))
#define HQQ_INLINE_LAMBDA __attribute__((always_inline))
#define HQQ_UNROLL _Pragma("GCC unroll 16")
#define HQQ_NO_UNROLL _Pragma("GCC unroll 1")
#define HQQ_PREFETCH(p) __builtin_prefetch(p)
// Hides where a pointer comes from. Values loaded through it twice are loaded twice: a broadcast is
// one instruction, keeping it for later costs a store and a load once registers run out.
#define HQQ_OPAQUE(p) __asm__ volatile("" : "+r"(p))
// Keeps a sum in its register. Compilers like to reorder integer additions into trees whose leaves
// do not fit the registers.
#if defined(__x86_64__)
#define HQQ_PIN(v) __asm__("" : "+x"(v))
#elif defined(__aarch64__)
#define HQQ_PIN(v) __asm__("" : "+w"(v))
#else
#define HQQ_PIN(v)
#endif
#endif

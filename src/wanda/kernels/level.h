/* The instruction sets that kernels are compiled for. */
#ifndef WANDA_LEVEL_H
#define WANDA_LEVEL_H

enum { LEVEL_PORTABLE, LEVEL_AVX2, LEVEL_AVX512, LEVEL_AVX512_BF16, LEVEL_AMX, LEVELS };

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define WANDA_X86 1
#include <immintrin.h>
#if __has_include(<avx512bf16intrin.h>) /* GCC before 10 and clang before 9 lack it: one path less, not no extension */
#define WANDA_BF16 1
#endif
#if defined(__linux__) && (__has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>)) /* GCC 11, clang 11 */
#define WANDA_AMX 1
#endif
/* Loops that the compiler makes vectors of; left alone, some take half of the 512 bits. Each compiler has its own word for
   it, and clang ignores a whole target attribute in which it does not know a word. */
#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl"
#if defined(__clang__)
#define TARGET_WIDE __attribute__((target(AVX512), min_vector_width(512)))
#elif __GNUC__ >= 10
#define TARGET_WIDE __attribute__((target(AVX512 ",prefer-vector-width=512")))
#else
#define TARGET_WIDE __attribute__((target(AVX512)))
#endif
#endif

#define INLINE static inline __attribute__((always_inline))

int best_level(void); /* of this processor and operating system */

#endif

/* 16 vectors of 16 lanes, turned. */
#ifndef WANDA_TRANSPOSE_H
#define WANDA_TRANSPOSE_H

#include "level.h"

#ifdef WANDA_X86
/* rows[i] lane j becomes rows[j] lane i. */
__attribute__((target("avx512f"))) INLINE void transpose(__m512i rows[16]) {
    __m512i a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        a[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* b[4 i + j]: columns j, j + 4, j + 8, j + 12 of rows 4 i .. 4 i + 3 */
        b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), high = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
        const __m512i low2 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
        const __m512i high2 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
        rows[j] = _mm512_shuffle_i32x4(low, low2, 0x88);
        rows[4 + j] = _mm512_shuffle_i32x4(high, high2, 0x88);
        rows[8 + j] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        rows[12 + j] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
}
#endif

#endif

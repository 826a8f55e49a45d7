/* AVX2: eight values a step; a byte of the mask becomes a permutation by PDEP. */
#include "packed_rows.h"

#ifdef WANDA_X86
#define TARGET __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt")))

TARGET INLINE __m256 load8(int kind, const void *values, int64_t at) {
    if (kind == KIND_F32) return _mm256_loadu_ps((const float *)values + at);
    __m128i bits = _mm_loadu_si128((const __m128i *)((const uint16_t *)values + at));
    if (kind == KIND_F16) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

TARGET INLINE __m256 expand8(uint32_t mask, __m256 packed) {
    const uint64_t lanes = _pdep_u64(mask, 0x0101010101010101u) * 0xff; /* 0xff in each surviving lane */
    const uint64_t rank = _pdep_u64(0x0706050403020100u, lanes);       /* which value belongs there */
    __m256i index = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)rank));
    __m256i keep = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)lanes));
    return _mm256_and_ps(_mm256_permutevar8x32_ps(packed, index), _mm256_castsi256_ps(keep));
}

TARGET INLINE float sum8(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

TARGET INLINE void rows(const rows_job *job, int64_t first, int64_t last, const int kind, const int columns) {
    const matrix *m = &job->p->m;
    for (int64_t row = first; row < last; row++) {
        const uint64_t *mask = m->mask + row * job->words;
        const float *x = job->x;
        int64_t at = m->offsets[row];
        __m256 sums[16];
        for (int c = 0; c < columns; c++) sums[c] = _mm256_setzero_ps();
        for (int64_t word = 0; word < job->words; word++) {
            uint64_t bits = mask[word];
            for (int step = 0; step < 8; step++, bits >>= 8, x += 8 * columns) {
                const uint32_t byte = bits & 0xff;
                const __m256 w = expand8(byte, load8(kind, m->values, at));
                at += __builtin_popcount(byte);
                for (int c = 0; c < columns; c++) sums[c] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + 8 * c), sums[c]);
            }
        }
        float out[16] = {0};
        for (int c = 0; c < columns; c++) out[c] = sum8(sums[c]);
        store_row(job, row, out);
    }
}

TARGET int64_t avx2_count(const uint64_t *mask, int64_t words) {
    int64_t count = 0;
    for (int64_t word = 0; word < words; word++) count += __builtin_popcountll(mask[word]);
    return count;
}

TARGET void avx2_rows(const rows_job *job, int64_t first, int64_t last) { FOR_KINDS_AND_COLUMNS(rows) }
#else
typedef int wanda_no_avx2; /* an empty file is no C */
#endif

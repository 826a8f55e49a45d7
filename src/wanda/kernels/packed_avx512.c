/* AVX-512. Without BF16 and VBMI2: 16 float32 lanes, VPEXPANDD. With them: 32 bfloat16 lanes, VPEXPANDW, VDPBF16PS. */
#include "packed_rows.h"

#ifdef WANDA_X86
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt")))

TARGET INLINE __m512 load16(int kind, const void *values, int64_t at) {
    if (kind == KIND_F32) return _mm512_loadu_ps((const float *)values + at);
    __m256i bits = _mm256_loadu_si256((const __m256i *)((const uint16_t *)values + at));
    if (kind == KIND_F16) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

TARGET INLINE void rows(const rows_job *job, int64_t first, int64_t last, const int kind, const int columns) {
    const matrix *m = &job->p->m;
    for (int64_t row = first; row < last; row++) {
        const uint64_t *mask = m->mask + row * job->words;
        const float *x = job->x;
        int64_t at = m->offsets[row];
        __m512 sums[16];
        for (int c = 0; c < columns; c++) sums[c] = _mm512_setzero_ps();
        for (int64_t word = 0; word < job->words; word++) {
            uint64_t bits = mask[word];
            _mm_prefetch((const char *)value_at(m, at) + 1024, _MM_HINT_T0);
            _mm_prefetch((const char *)value_at(m, at) + 1088, _MM_HINT_T0);
            for (int step = 0; step < 4; step++, bits >>= 16, x += 16 * columns) {
                const __mmask16 lanes = (__mmask16)bits;
                const __m512 w = _mm512_maskz_expand_ps(lanes, load16(kind, m->values, at));
                at += __builtin_popcount(lanes);
                for (int c = 0; c < columns; c++) sums[c] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + 16 * c), sums[c]);
            }
        }
        float out[16] = {0};
        for (int c = 0; c < columns; c++) out[c] = _mm512_reduce_add_ps(sums[c]);
        store_row(job, row, out);
    }
}

TARGET void avx512_rows(const rows_job *job, int64_t first, int64_t last) { FOR_KINDS_AND_COLUMNS(rows) }

TARGET void avx512_expand(const matrix *m, int64_t row, int kind, void *out) {
    const int64_t words = (m->width + 63) / 64;
    const uint64_t *mask = m->mask + row * words;
    int64_t at = m->offsets[row];
    for (int64_t column = 0; column < m->width; column += 16) {
        const __mmask16 lanes = (__mmask16)(mask[column / 64] >> column % 64);
        const int64_t left = m->width - column;
        const __mmask16 store = left < 16 ? (__mmask16)((1u << left) - 1) : (__mmask16)0xffff;
        if (m->kind == KIND_F32) {
            __m512i v = _mm512_maskz_expand_epi32(lanes, _mm512_loadu_si512((const uint32_t *)m->values + at));
            _mm512_mask_storeu_epi32((uint32_t *)out + column, store, v);
        } else if (kind == KIND_F32) {
            _mm512_mask_storeu_ps((float *)out + column, store, _mm512_maskz_expand_ps(lanes, load16(m->kind, m->values, at)));
        } else {
            __m256i bits = _mm256_loadu_si256((const __m256i *)((const uint16_t *)m->values + at));
            __m512i v = _mm512_maskz_expand_epi32(lanes, _mm512_cvtepu16_epi32(bits));
            _mm256_mask_storeu_epi16((uint16_t *)out + column, store, _mm512_cvtepi32_epi16(v));
        }
        at += __builtin_popcount(lanes);
    }
}

#ifdef WANDA_BF16
#define TARGET_BF16                                                                                             \
    __attribute__((target(                                                                                      \
        "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,f16c,bmi,bmi2,popcnt")))

TARGET_BF16 INLINE __m512i expand32(uint32_t lanes, const uint16_t *values) {
    __asm__("" : "+r"(lanes)); /* or the compiler shifts mask registers, which is slower than filling two */
    return _mm512_maskz_expand_epi16(lanes, _mm512_loadu_si512(values));
}

TARGET_BF16 INLINE __m512 dot(__m512 sum, __m512i w, const uint16_t *x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
}

TARGET_BF16 INLINE void bf16_rows(const rows_job *job, int64_t first, int64_t last, const int kind, const int columns) {
    const matrix *m = &job->p->m;
    (void)kind;
    for (int64_t row = first; row < last; row++) {
        const uint64_t *mask = m->mask + row * job->words;
        const uint16_t *x = job->x;
        const uint16_t *values = (const uint16_t *)m->values + m->offsets[row];
        __m512 sums[FEW_COLUMNS], more[3] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int c = 0; c < columns; c++) sums[c] = _mm512_setzero_ps();
        int64_t word = 0;
        /* One column: four chains, or the latency of the dot product shows. Not several rows at a time: more streams
           than one a thread read memory more slowly. */
        for (; columns == 1 && word + 2 <= job->words; word += 2, x += 128) {
            const uint64_t bits = mask[word], next = mask[word + 1];
            const uint16_t *then = values + __builtin_popcountll(bits);
            const __m512i w0 = expand32((uint32_t)bits, values);
            const __m512i w1 = expand32((uint32_t)(bits >> 32), values + __builtin_popcount((uint32_t)bits));
            _mm_prefetch((const char *)values + 2048, _MM_HINT_T0);
            const __m512i w2 = expand32((uint32_t)next, then);
            const __m512i w3 = expand32((uint32_t)(next >> 32), then + __builtin_popcount((uint32_t)next));
            _mm_prefetch((const char *)then + 2048, _MM_HINT_T0);
            sums[0] = dot(sums[0], w0, x);
            more[0] = dot(more[0], w1, x + 32);
            more[1] = dot(more[1], w2, x + 64);
            more[2] = dot(more[2], w3, x + 96);
            values = then + __builtin_popcountll(next);
        }
        for (; word < job->words; word++, x += 64 * columns) {
            const uint64_t bits = mask[word];
            _mm_prefetch((const char *)values + 2048, _MM_HINT_T0);
            const __m512i low = expand32((uint32_t)bits, values);
            const __m512i high = expand32((uint32_t)(bits >> 32), values + __builtin_popcount((uint32_t)bits));
            values += __builtin_popcountll(bits);
            for (int c = 0; c < columns; c++) sums[c] = dot(sums[c], low, x + 32 * c);
            for (int c = 0; c < columns; c++) sums[c] = dot(sums[c], high, x + 32 * (columns + c));
        }
        sums[0] = _mm512_add_ps(_mm512_add_ps(sums[0], more[0]), _mm512_add_ps(more[1], more[2]));
        float out[FEW_COLUMNS] = {0};
        for (int c = 0; c < columns; c++) out[c] = _mm512_reduce_add_ps(sums[c]);
        store_row(job, row, out);
    }
}

TARGET_BF16 INLINE void dense_rows(const rows_job *job, int64_t first, int64_t last, const int kind, const int columns) {
    const matrix *m = &job->p->m;
    const int64_t whole = m->width / 32;
    const __mmask32 tail = (__mmask32)((1ull << m->width % 32) - 1);
    (void)kind;
    for (int64_t row = first; row < last; row++) {
        const uint16_t *x = job->x;
        const uint16_t *values = (const uint16_t *)m->values + row * m->width;
        __m512 sums[FEW_COLUMNS], odd = _mm512_setzero_ps();
        for (int c = 0; c < columns; c++) sums[c] = _mm512_setzero_ps();
        int64_t piece = 0;
        if (columns == 1) {
            for (; piece + 2 <= whole; piece += 2, x += 64, values += 64) {
                _mm_prefetch((const char *)values + 2048, _MM_HINT_T0);
                _mm_prefetch((const char *)values + 2112, _MM_HINT_T0);
                sums[0] = dot(sums[0], _mm512_loadu_si512(values), x);
                odd = dot(odd, _mm512_loadu_si512(values + 32), x + 32);
            }
        }
        for (; piece < whole; piece++, x += 32 * columns, values += 32) {
            _mm_prefetch((const char *)values + 2048, _MM_HINT_T0);
            const __m512i w = _mm512_loadu_si512(values);
            for (int c = 0; c < columns; c++) sums[c] = dot(sums[c], w, x + 32 * c);
        }
        if (tail) {
            const __m512i w = _mm512_maskz_loadu_epi16(tail, values);
            for (int c = 0; c < columns; c++) sums[c] = dot(sums[c], w, x + 32 * c);
        }
        sums[0] = _mm512_add_ps(sums[0], odd);
        float out[FEW_COLUMNS] = {0};
        for (int c = 0; c < columns; c++) out[c] = _mm512_reduce_add_ps(sums[c]);
        store_row(job, row, out);
    }
}

TARGET_BF16 void avx512_bf16_rows(const rows_job *job, int64_t first, int64_t last) {
    if (job->p->m.mask) {
        FOR_FEW_COLUMNS(bf16_rows, KIND_BF16)
    } else {
        FOR_FEW_COLUMNS(dense_rows, KIND_BF16)
    }
}

TARGET_BF16 void avx512_bf16_expand(const matrix *m, int64_t row, int kind, void *out) {
    (void)kind; /* two bytes, as the matrix's */
    const int64_t words = (m->width + 63) / 64;
    const uint64_t *mask = m->mask + row * words;
    const uint16_t *values = (const uint16_t *)m->values + m->offsets[row];
    uint16_t *to = out;
    for (int64_t column = 0; column < m->width; column += 32) {
        const uint32_t lanes = (uint32_t)(mask[column / 64] >> column % 64);
        const int64_t left = m->width - column;
        if (left >= 32)
            _mm512_storeu_si512(to + column, expand32(lanes, values));
        else
            _mm512_mask_storeu_epi16(to + column, (__mmask32)((1u << left) - 1), expand32(lanes, values));
        values += __builtin_popcount(lanes);
    }
}
#endif
#else
typedef int wanda_no_avx512; /* an empty file is no C */
#endif

/* AVX2: a byte of the mask puts eight two-byte values into their places (PSHUFB), half a byte four float32 ones. Not by
   PDEP: it is microcode on AMD before Zen 3, 10 ns a weight. */
#include "packed_rows.h"

#ifdef WANDA_X86
#define TARGET __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt")))

/* For each mask the bytes that PSHUFB takes: lane i gets the value with as many survivors before it, or zero. */
#define BEFORE(mask, i) __builtin_popcount((mask) & ((1 << (i)) - 1))
#define BYTE(mask, i, size, b) ((mask) >> (i) & 1 ? (size) * BEFORE(mask, i) + (b) : 0x80)
#define PAIR(mask, i) BYTE(mask, i, 2, 0), BYTE(mask, i, 2, 1)
#define OF_8(mask) \
    {PAIR(mask, 0), PAIR(mask, 1), PAIR(mask, 2), PAIR(mask, 3), PAIR(mask, 4), PAIR(mask, 5), PAIR(mask, 6), PAIR(mask, 7)}
#define FOUR(mask, i) BYTE(mask, i, 4, 0), BYTE(mask, i, 4, 1), BYTE(mask, i, 4, 2), BYTE(mask, i, 4, 3)
#define OF_4(mask) {FOUR(mask, 0), FOUR(mask, 1), FOUR(mask, 2), FOUR(mask, 3)}
#define TIMES_4(row, mask) row(mask), row((mask) + 1), row((mask) + 2), row((mask) + 3)
#define TIMES_16(row, mask) \
    TIMES_4(row, mask), TIMES_4(row, (mask) + 4), TIMES_4(row, (mask) + 8), TIMES_4(row, (mask) + 12)
#define TIMES_64(row, mask) \
    TIMES_16(row, mask), TIMES_16(row, (mask) + 16), TIMES_16(row, (mask) + 32), TIMES_16(row, (mask) + 48)

static const _Alignas(64) uint8_t PLACES_8[256][16] = {TIMES_64(OF_8, 0), TIMES_64(OF_8, 64), TIMES_64(OF_8, 128),
                                                       TIMES_64(OF_8, 192)};
static const _Alignas(64) uint8_t PLACES_4[16][16] = {TIMES_16(OF_4, 0)};

/* Eight two-byte values in their places, zeros between them; `place` is a byte of the mask times 16. */
TARGET INLINE __m128i expand8(uint64_t place, const uint16_t *values) {
    const __m128i places = _mm_load_si128((const __m128i *)((const char *)PLACES_8 + place));
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)values), places);
}

/* Four float32 values in their places; `mask` is half a byte. */
TARGET INLINE __m128i expand4(uint64_t mask, const uint32_t *values) {
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)values), _mm_load_si128((const __m128i *)PLACES_4[mask]));
}

/* Byte `step` of a mask word times 16: a rotation, which needs no copy, and one AND. */
INLINE uint64_t place_of(uint64_t bits, int step) {
    const int left = (68 - 8 * step) % 64;
    return (bits << left | bits >> (64 - left)) & 0xff0;
}

/* Eight weights as two vectors; those of bfloat16 the even ones first, then the odd ones, which costs no shuffle: x is
   laid out the same way (`split`). place: a byte of the mask times 16. */
TARGET INLINE void weights(int kind, uint64_t place, const void *values, int64_t at, __m128 *low, __m128 *high) {
    if (kind == KIND_F32) {
        const uint32_t *from = (const uint32_t *)values + at;
        const uint64_t first = place >> 4 & 15;
        *low = _mm_castsi128_ps(expand4(first, from));
        *high = _mm_castsi128_ps(expand4(place >> 8, from + __builtin_popcountll(first)));
        return;
    }
    const __m128i placed = expand8(place, (const uint16_t *)values + at);
    if (kind == KIND_BF16) {
        *low = _mm_castsi128_ps(_mm_slli_epi32(placed, 16));
        *high = _mm_castsi128_ps(_mm_and_si128(placed, _mm_set1_epi32((int)0xffff0000)));
    } else {
        const __m256 both = _mm256_cvtph_ps(placed);
        *low = _mm256_castps256_ps128(both);
        *high = _mm256_extractf128_ps(both, 1);
    }
}

TARGET INLINE float sum4(__m128 v) {
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}

TARGET INLINE float sum8(__m256 v) { return sum4(_mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1))); }

TARGET INLINE void one_column(const rows_job *job, int64_t first, int64_t last, const int kind) {
    const matrix *m = &job->p->m;
    for (int64_t row = first; row < last; row++) {
        const uint64_t *mask = m->mask + row * job->words;
        const float *x = job->x;
        int64_t at = m->offsets[row];
        __m128 sums[8]; /* eight chains, or the latency of the sums shows */
        for (int i = 0; i < 8; i++) sums[i] = _mm_setzero_ps();
        for (int64_t word = 0; word < job->words; word++, x += 64) {
            const uint64_t bits = mask[word];
            int64_t then = at + __builtin_popcountll(bits << 32); /* two chains of counts as well */
            _mm_prefetch((const char *)value_at(m, at) + 1024, _MM_HINT_T0); /* 64 two-byte values are two lines */
            _mm_prefetch((const char *)value_at(m, at) + 1088, _MM_HINT_T0);
#pragma GCC unroll 8
            for (int step = 0; step < 8; step++) {
                __m128 low, high;
                const uint64_t place = place_of(bits, step);
                int64_t *from = step < 4 ? &at : &then;
                weights(kind, place, m->values, *from, &low, &high);
                *from += __builtin_popcountll(place);
                const int chain = step % 4 * 2;
                sums[chain] = _mm_fmadd_ps(low, _mm_loadu_ps(x + 8 * step), sums[chain]);
                sums[chain + 1] = _mm_fmadd_ps(high, _mm_loadu_ps(x + 8 * step + 4), sums[chain + 1]);
            }
            at = then;
        }
        for (int i = 0; i < 4; i++) sums[i] = _mm_add_ps(sums[i], sums[i + 4]);
        const float out[MOST_COLUMNS] = {sum4(_mm_add_ps(_mm_add_ps(sums[0], sums[1]), _mm_add_ps(sums[2], sums[3])))};
        store_row(job, row, out);
    }
}

TARGET INLINE void rows(const rows_job *job, int64_t first, int64_t last, const int kind, const int columns) {
    const matrix *m = &job->p->m;
    if (columns == 1) {
        one_column(job, first, last, kind);
        return;
    }
    for (int64_t row = first; row < last; row++) {
        const uint64_t *mask = m->mask + row * job->words;
        const float *x = job->x;
        int64_t at = m->offsets[row];
        __m256 sums[16];
        for (int c = 0; c < columns; c++) sums[c] = _mm256_setzero_ps();
        for (int64_t word = 0; word < job->words; word++) {
            const uint64_t bits = mask[word];
#pragma GCC unroll 8
            for (int step = 0; step < 8; step++, x += 8 * columns) {
                __m128 low, high;
                const uint64_t place = place_of(bits, step);
                weights(kind, place, m->values, at, &low, &high);
                at += __builtin_popcountll(place);
                const __m256 w = _mm256_set_m128(high, low);
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

/* Eight weights of a row in their places, as elements of `kind`; `byte` of the mask. */
TARGET INLINE void expand_byte(const matrix *m, uint64_t byte, int64_t at, int kind, char *to) {
    if (m->kind == KIND_F32) {
        const uint32_t *from = (const uint32_t *)m->values + at;
        _mm_storeu_si128((__m128i *)to, expand4(byte & 15, from));
        _mm_storeu_si128((__m128i *)to + 1, expand4(byte >> 4, from + __builtin_popcountll(byte & 15)));
        return;
    }
    const __m128i placed = expand8(16 * byte, (const uint16_t *)m->values + at);
    if (kind != KIND_F32)
        _mm_storeu_si128((__m128i *)to, placed);
    else if (m->kind == KIND_F16)
        _mm256_storeu_ps((float *)to, _mm256_cvtph_ps(placed));
    else
        _mm256_storeu_si256((__m256i *)to, _mm256_slli_epi32(_mm256_cvtepu16_epi32(placed), 16));
}

TARGET void avx2_expand(const matrix *m, int64_t row, int kind, void *out) {
    const int64_t size = kind == KIND_F32 ? 4 : 2;
    const uint64_t *mask = m->mask + row * ((m->width + 63) / 64);
    int64_t at = m->offsets[row];
    char *to = out;
    for (int64_t column = 0; column < m->width; column += 8, to += 8 * size) {
        const uint64_t byte = mask[column / 64] >> column % 64 & 0xff;
        if (m->width - column >= 8) {
            expand_byte(m, byte, at, kind, to);
        } else {
            char last[32];
            expand_byte(m, byte, at, kind, last);
            memcpy(to, last, (size_t)((m->width - column) * size));
        }
        at += __builtin_popcountll(byte);
    }
}
#else
typedef int wanda_no_avx2; /* an empty file is no C */
#endif

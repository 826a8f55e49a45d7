/* Many columns (prefill): bfloat16 matrix product with VDPBF16PS whose weights come out of the packed form on the way.

   x is laid out once in panels of 16 tokens, pairs of inputs side by side ([panels, width / 2, 16] pairs). A task takes
   ROWS rows: DEPTH inputs of them at a time are expanded into its own cache and multiplied with all panels there. */
#include <stdlib.h>

#include "packed_rows.h"

#ifdef WANDA_X86
#define TARGET                                                                                                  \
    __attribute__((target(                                                                                      \
        "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,f16c,bmi,bmi2,popcnt")))

enum {
    ROWS = 48,           /* of a task */
    TILE = 6,            /* rows and */
    PANELS = 4,          /* panels held in registers */
    DEPTH = 1024,        /* inputs expanded at a time; a multiple of 64 */
    STRIDE = DEPTH + 32, /* elements between expanded rows: not a power of two, or they fall into the same cache sets */
};

/* rows[i] lane j becomes rows[j] lane i. */
TARGET INLINE void transpose(__m512i rows[16]) {
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

typedef struct {
    const product *p;
    uint16_t *x;           /* [panels, padded / 2, 16, 2] */
    int64_t padded;        /* width, up to whole mask words */
    int64_t panels;        /* of 16 columns */
    int64_t blocks;        /* of ROWS rows */
    int64_t block_panels;  /* panels of a task */
    _Atomic int failed;
} tiled_work;

TARGET static void lay_out_panels(void *context, int64_t first, int64_t last) {
    const tiled_work *work = context;
    const product *p = work->p;
    for (int64_t panel = first; panel < last; panel++) {
        uint16_t *to = work->x + panel * work->padded * 16;
        for (int64_t start = 0; start < work->padded; start += 32, to += 512) {
            const int64_t left = p->m.width - start;
            const __mmask32 inside = left >= 32 ? 0xffffffffu : left > 0 ? (1u << left) - 1 : 0;
            __m512i rows[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                const int64_t column = panel * 16 + i;
                rows[i] = column < p->columns
                              ? _mm512_maskz_loadu_epi16(inside, (const uint16_t *)p->x + column * p->x_stride + start)
                              : _mm512_setzero_si512();
            }
            transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) _mm512_store_si512(to + 32 * i, rows[i]);
        }
    }
}

/* sums[TILE, panels, 16] += w [TILE, STRIDE] times x over `depth` inputs; the panels of x lie x_step elements apart. */
TARGET INLINE void tile(const uint16_t *w, const uint16_t *x, int64_t x_step, int64_t depth, float *sums,
                        int64_t sums_step, const int panels) {
    __m512 held[TILE][PANELS];
#pragma GCC unroll 6
    for (int r = 0; r < TILE; r++)
#pragma GCC unroll 4
        for (int c = 0; c < panels; c++) held[r][c] = _mm512_load_ps(sums + r * sums_step + 16 * c);
    for (int64_t j = 0; j < depth; j += 2) {
        __m512i columns[PANELS];
#pragma GCC unroll 4
        for (int c = 0; c < panels; c++) columns[c] = _mm512_load_si512(x + c * x_step + 16 * j);
#pragma GCC unroll 6
        for (int r = 0; r < TILE; r++) {
            uint32_t pair;
            memcpy(&pair, w + r * STRIDE + j, 4);
            const __m512i both = _mm512_set1_epi32((int)pair);
#pragma GCC unroll 4
            for (int c = 0; c < panels; c++)
                held[r][c] = _mm512_dpbf16_ps(held[r][c], (__m512bh)both, (__m512bh)columns[c]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < TILE; r++)
#pragma GCC unroll 4
        for (int c = 0; c < panels; c++) _mm512_store_ps(sums + r * sums_step + 16 * c, held[r][c]);
}

/* Expands or copies `depth` inputs of a row from input `start` on into w; *at moves on by the values taken. */
TARGET INLINE void fetch(const matrix *m, int64_t row, int64_t words, int64_t start, int64_t depth, int64_t *at,
                         uint16_t *w) {
    const uint16_t *values = (const uint16_t *)m->values + *at;
    if (!m->mask) {
        for (int64_t j = 0; j < depth; j += 32) {
            const int64_t left = m->width - start - j;
            const __mmask32 inside = left >= 32 ? 0xffffffffu : left > 0 ? (1u << left) - 1 : 0;
            _mm512_storeu_si512(w + j, _mm512_maskz_loadu_epi16(inside, values + j));
        }
        *at += depth;
        return;
    }
    const uint64_t *mask = m->mask + row * words + start / 64;
    for (int64_t j = 0; j < depth; j += 64, mask++) {
        const uint32_t low = (uint32_t)*mask, high = (uint32_t)(*mask >> 32);
        const int count = __builtin_popcount(low);
        _mm512_storeu_si512(w + j, _mm512_maskz_expand_epi16(low, _mm512_loadu_si512(values)));
        _mm512_storeu_si512(w + j + 32, _mm512_maskz_expand_epi16(high, _mm512_loadu_si512(values + count)));
        values += count + __builtin_popcount(high);
    }
    *at = values - (const uint16_t *)m->values;
}

/* sums [ROWS, panels, 16] to out [columns, rows] in bfloat16. */
TARGET INLINE void store_block(const product *p, const float *sums, int64_t sums_step, int64_t row, int64_t rows,
                               int64_t first_panel, int64_t panels) {
    for (int64_t r = 0; r < rows; r += 16) {
        const int64_t left = rows - r;
        const __mmask16 inside = left >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << left) - 1);
        __m512 bias = _mm512_setzero_ps();
        if (p->bias) {
            const __m256i bits = _mm256_maskz_loadu_epi16(inside, (const uint16_t *)p->bias + row + r);
            bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        }
        for (int64_t panel = 0; panel < panels; panel++) {
            __m512i square[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) square[i] = _mm512_load_si512(sums + (r + i) * sums_step + 16 * panel);
            transpose(square);
            const int64_t column = (first_panel + panel) * 16;
            const int64_t count = p->columns - column < 16 ? p->columns - column : 16;
            for (int64_t i = 0; i < count; i++) {
                const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_add_ps(_mm512_castsi512_ps(square[i]), bias));
                _mm256_mask_storeu_epi16((uint16_t *)p->out + (column + i) * p->out_stride + row + r, inside,
                                         (__m256i)rounded);
            }
        }
    }
}

TARGET static void run_tasks(void *context, int64_t first, int64_t last) {
    tiled_work *work = context;
    const product *p = work->p;
    const int64_t words = work->padded / 64, sums_step = work->block_panels * 16;
    float *sums = aligned_alloc(64, (size_t)(ROWS * sums_step) * 4);
    uint16_t *w = aligned_alloc(64, ROWS * STRIDE * 2);
    if (!sums || !w) {
        work->failed = 1;
        first = last;
    }
    for (int64_t task = first; task < last; task++) {
        const int64_t row = task % work->blocks * ROWS, panel = task / work->blocks * work->block_panels;
        const int64_t rows = p->m.rows - row < ROWS ? p->m.rows - row : ROWS;
        const int64_t panels = work->panels - panel < work->block_panels ? work->panels - panel : work->block_panels;
        int64_t at[ROWS];
        for (int64_t r = 0; r < rows; r++) at[r] = p->m.mask ? p->m.offsets[row + r] : (row + r) * p->m.width;
        memset(sums, 0, (size_t)(ROWS * sums_step) * 4);
        if (rows < ROWS) memset(w, 0, ROWS * STRIDE * 2);
        for (int64_t start = 0; start < work->padded; start += DEPTH) {
            const int64_t depth = work->padded - start < DEPTH ? work->padded - start : DEPTH;
            for (int64_t r = 0; r < rows; r++) fetch(&p->m, row + r, words, start, depth, &at[r], w + r * STRIDE);
            for (int64_t c = 0; c < panels; c += PANELS) {
                const uint16_t *x = work->x + (panel + c) * work->padded * 16 + start * 16;
                const int64_t step = work->padded * 16;
                for (int64_t r = 0; r < rows; r += TILE) {
                    const uint16_t *from = w + r * STRIDE;
                    float *to = sums + r * sums_step + 16 * c;
                    switch (panels - c) {
                        case 1: tile(from, x, step, depth, to, sums_step, 1); break;
                        case 2: tile(from, x, step, depth, to, sums_step, 2); break;
                        case 3: tile(from, x, step, depth, to, sums_step, 3); break;
                        default: tile(from, x, step, depth, to, sums_step, 4); break;
                    }
                }
            }
        }
        store_block(p, sums, sums_step, row, rows, panel, panels);
    }
    free(sums);
    free(w);
}

int matrix_product_tiled(const product *p, int threads, gomp_parallel pool) {
    tiled_work work = {.p = p,
                       .padded = (p->m.width + 63) / 64 * 64,
                       .panels = (p->columns + 15) / 16,
                       .blocks = (p->m.rows + ROWS - 1) / ROWS};
    if (p->m.rows == 0 || p->columns == 0) return 0;
    /* Enough tasks for all threads; a split along the columns costs another expansion of the weights. */
    int64_t splits = work.blocks >= 2 * threads ? 1 : (2 * threads + work.blocks - 1) / work.blocks;
    work.block_panels = (work.panels + splits - 1) / splits;
    if (work.block_panels < PANELS) work.block_panels = PANELS;
    if (work.block_panels > 64) work.block_panels = 64; /* so that the sums stay in cache */
    splits = (work.panels + work.block_panels - 1) / work.block_panels;
    work.x = aligned_alloc(64, (size_t)(work.panels * (work.padded + 1) * 32 + 63) / 64 * 64);
    if (!work.x) return -1;
    parallel_for(lay_out_panels, &work, work.panels, 1, threads, pool);
    parallel_for(run_tasks, &work, work.blocks * splits, 1, threads, pool);
    free(work.x);
    return work.failed ? -1 : 0;
}
#else
int matrix_product_tiled(const product *p, int threads, gomp_parallel pool) {
    (void)p, (void)threads, (void)pool;
    return -1;
}
#endif

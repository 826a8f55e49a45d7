/* TDPBF16PS multiplies 16 columns of a by 16 columns of b over 32 tokens: a column of a is a row of the left factor, its
   tokens side by side; b is the right factor, pairs of tokens of 16 columns side by side. A pair of two columns of tiles
   on each side keeps 32 x 32 sums in four tiles while DEPTH tokens pass by. */
#include <stdlib.h>

#include "amx.h"
#include "gram.h"
#include "transpose.h"

#ifdef WANDA_AMX

enum {
    SIZE = 16 * 16,  /* pairs of tokens of a tile */
    DEPTH = 16,      /* tiles of 32 tokens: those of 32 columns of a fill two thirds of the first-level cache */
    PANEL = 128,     /* columns of b that stay in the second-level cache while all of a passes by */
    EDGE = 32,       /* columns of both that are multiplied at a time */
};

typedef struct {
    const token_product *p;
    int64_t depth;         /* tiles of 32 tokens */
    int64_t left, right;   /* tiles of 16 columns, an even number of each */
    uint32_t *a, *b;       /* [left or right, depth, SIZE] */
} gram_job;

/* 16 columns of x from `first` on as tiles [depth, 16 pairs, 16], zero beyond the edges; `turned`: [depth, 16, 16 pairs]. */
TARGET_AMX INLINE void lay_out(const uint16_t *x, int64_t stride, int64_t tokens, int64_t columns, int64_t first,
                               int64_t depth, int turned, uint32_t *to) {
    const int64_t left = columns - first;
    const __mmask16 inside = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
    for (int64_t k = 0; k < depth; k++, to += SIZE) {
        const uint16_t *from = x + 32 * k * stride + first;
        const int64_t here = tokens - 32 * k;
        __m512i lanes[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            __m256i even = _mm256_setzero_si256(), odd = even;
            if (2 * i < here) even = _mm256_maskz_loadu_epi16(inside, from + 2 * i * stride);
            if (2 * i + 1 < here) odd = _mm256_maskz_loadu_epi16(inside, from + (2 * i + 1) * stride);
            lanes[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
        }
        if (turned) transpose(lanes);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) _mm512_store_si512(to + 16 * i, lanes[i]);
    }
}

TARGET_AMX static void lay_out_both(void *context, int64_t first, int64_t last) {
    const gram_job *job = context;
    const token_product *p = job->p;
    for (int64_t i = first; i < last; i++)
        if (i < job->right)
            lay_out(p->b, p->b_stride, p->tokens, p->columns, 16 * i, job->depth, 0, job->b + i * job->depth * SIZE);
        else
            lay_out(p->a, p->a_stride, p->tokens, p->rows, 16 * (i - job->right), job->depth, 1,
                    job->a + (i - job->right) * job->depth * SIZE);
}

/* Adds `depth` tiles of tokens of 32 columns of a and of b, `apart` pairs between the halves of each, to out [32, 32]. */
TARGET_AMX static void multiply_edge(const uint32_t *a, const uint32_t *b, int64_t apart, int64_t depth, float *out,
                                     int64_t stride) {
    float *below = out + 16 * stride;
    _tile_loadd(0, out, 4 * stride);
    _tile_loadd(1, out + 16, 4 * stride);
    _tile_loadd(2, below, 4 * stride);
    _tile_loadd(3, below + 16, 4 * stride);
    for (int64_t k = 0; k < depth; k++, a += SIZE, b += SIZE) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + apart, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + apart, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, 4 * stride);
    _tile_stored(1, out + 16, 4 * stride);
    _tile_stored(2, below, 4 * stride);
    _tile_stored(3, below + 16, 4 * stride);
}

/* multiply_edge where only [rows, columns] of out exist. */
TARGET_AMX static void multiply_corner(const uint32_t *a, const uint32_t *b, int64_t apart, int64_t depth, float *out,
                                       int64_t stride, int64_t rows, int64_t columns) {
    _Alignas(64) float whole[EDGE * EDGE] = {0};
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) whole[i * EDGE + j] = out[i * stride + j];
    tiles_read_memory();
    multiply_edge(a, b, apart, depth, whole, EDGE);
    tiles_read_memory();
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) out[i * stride + j] = whole[i * EDGE + j];
}

/* An item is a panel of columns and EDGE rows, the tall panels of an upper triangle first. */
TARGET_AMX static void multiply(void *context, int64_t first, int64_t last) {
    const gram_job *job = context;
    const token_product *p = job->p;
    const int64_t strips = job->left / 2, panels = (p->columns + PANEL - 1) / PANEL, apart = job->depth * SIZE;
    const tile_shapes before = begin_tiles();
    tiles_read_memory();
    for (int64_t item = first; item < last; item++) {
        const int64_t panel = panels - 1 - item / strips, row = item % strips * EDGE;
        for (int64_t k = 0; k < job->depth; k += DEPTH) {
            const int64_t depth = job->depth - k < DEPTH ? job->depth - k : DEPTH;
            for (int64_t column = panel * PANEL; column < (panel + 1) * PANEL && column < p->columns; column += EDGE) {
                if (p->upper && row >= column + EDGE) continue;
                const uint32_t *a = job->a + row / 16 * apart + k * SIZE, *b = job->b + column / 16 * apart + k * SIZE;
                float *out = p->out + row * p->out_stride + column;
                const int64_t rows = p->rows - row, columns = p->columns - column;
                if (rows >= EDGE && columns >= EDGE)
                    multiply_edge(a, b, apart, depth, out, p->out_stride);
                else
                    multiply_corner(a, b, apart, depth, out, p->out_stride, rows < EDGE ? rows : EDGE,
                                    columns < EDGE ? columns : EDGE);
            }
        }
    }
    end_tiles(&before);
}

int add_token_product_amx(const token_product *p, int threads, gomp_parallel pool) {
    if (p->tokens <= 0 || p->rows <= 0 || p->columns <= 0) return 0;
    gram_job job = {.p = p,
                    .depth = (p->tokens + 31) / 32,
                    .left = (p->rows + EDGE - 1) / EDGE * 2,
                    .right = (p->columns + EDGE - 1) / EDGE * 2};
    job.a = aligned_alloc(64, (size_t)(job.left * job.depth * SIZE) * sizeof *job.a);
    job.b = aligned_alloc(64, (size_t)(job.right * job.depth * SIZE) * sizeof *job.b);
    const int failed = job.a && job.b ? 0 : -1;
    if (!failed) {
        parallel_for(lay_out_both, &job, job.left + job.right, 2, threads, pool);
        parallel_for(multiply, &job, (p->columns + PANEL - 1) / PANEL * (job.left / 2), 1, threads, pool);
    }
    free(job.a);
    free(job.b);
    return failed;
}
#else
int add_token_product_amx(const token_product *p, int threads, gomp_parallel pool) {
    (void)p, (void)threads, (void)pool;
    return -1;
}
#endif

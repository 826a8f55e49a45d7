/* Many columns (prefill): bfloat16 matrix product with VDPBF16PS whose weights come out of the packed form on the way.

   A task takes ROWS rows of the matrix and some tokens. DEPTH inputs of its rows at a time are expanded into its own
   cache in panels of 16 rows, pairs of inputs side by side ([panels, DEPTH / 2, 16] pairs): a vector holds a pair of
   every row of a panel, and is multiplied with the same pair of a token, which is read where it lies. So neither the
   tokens nor the result are copied, and what is laid out is used by all tokens of the task. */
#include "packed_rows.h"
#include "transpose.h"

#ifdef WANDA_BF16
#define TARGET                                                                                                  \
    __attribute__((target(                                                                                      \
        "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,f16c,bmi,bmi2,popcnt")))

enum {
    PANELS = 3, /* of 16 rows, and */
    TILE = 8,   /* tokens are held in registers */
    ROWS = 16 * PANELS,
    DEPTH = 1024, /* inputs expanded at a time; a multiple of 64 */
    TOKENS = 512, /* of a task at most: their sums stay in cache where the inputs take several turns */
};

typedef struct {
    const product *p;
    int64_t words;  /* 64-bit mask words in a row */
    int64_t blocks; /* of ROWS rows */
    int64_t tokens; /* of a task */
} tiled_work;

/* Lays out inputs [start, start + depth) of up to 16 rows, the missing ones zero: to [depth / 2, 16] pairs. at[i], where
   the values of row i go on, moves on by those taken. */
TARGET INLINE void lay_out_panel(const matrix *m, int64_t row, int64_t rows, int64_t words, int64_t start, int64_t depth,
                                 int64_t *at, uint16_t *to) {
    const uint16_t *values = m->values;
    for (int64_t j = start; j < start + depth; j += 32, to += 512) {
        __m512i lanes[16];
        if (m->mask) {
            const uint64_t *mask = m->mask + row * words + j / 64;
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                lanes[i] = _mm512_setzero_si512();
                if (i < rows) {
                    const uint32_t bits = (uint32_t)(mask[i * words] >> j % 64);
                    lanes[i] = _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(values + at[i]));
                    at[i] += __builtin_popcount(bits);
                }
            }
        } else {
            const int64_t left = m->width - j;
            const __mmask32 inside = left >= 32 ? 0xffffffffu : left > 0 ? (1u << left) - 1 : 0;
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                lanes[i] = i < rows ? _mm512_maskz_loadu_epi16(inside, values + (row + i) * m->width + j)
                                    : _mm512_setzero_si512();
        }
        transpose(lanes);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) _mm512_store_si512(to + 32 * i, lanes[i]);
    }
}

/* What a tile of tokens reads and writes. */
typedef struct {
    const uint16_t *w; /* [panels, DEPTH / 2, 16] pairs */
    const uint16_t *x; /* [tokens, inputs], x_stride elements apart */
    int64_t x_stride, inputs;
    float *sums;  /* [tokens, ROWS]; read unless `first`, written unless `last` */
    uint16_t *out; /* [tokens, rows], out_stride elements apart; written when `last` */
    int64_t out_stride, rows;
    const uint16_t *bias; /* [rows] or NULL */
    int first, last;
} tile_job;

TARGET INLINE void tile(const tile_job *job, int64_t token, const int tokens, const int panels) {
    __m512 held[TILE][PANELS];
    float *sums = job->sums + token * ROWS;
#pragma GCC unroll 8
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 3
        for (int c = 0; c < panels; c++)
            held[t][c] = job->first ? _mm512_setzero_ps() : _mm512_load_ps(sums + t * ROWS + 16 * c);
    const uint16_t *w = job->w, *x = job->x + token * job->x_stride;
    const int64_t stride = job->x_stride, whole = job->inputs / 2 * 2;
    for (int64_t j = 0; j < whole; j += 2) {
        __m512i rows[PANELS];
#pragma GCC unroll 3
        for (int c = 0; c < panels; c++) rows[c] = _mm512_load_si512(w + c * DEPTH * 16 + 16 * j);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) {
            uint32_t pair;
            memcpy(&pair, x + t * stride + j, 4);
            const __m512i both = _mm512_set1_epi32((int)pair);
#pragma GCC unroll 3
            for (int c = 0; c < panels; c++)
                held[t][c] = _mm512_dpbf16_ps(held[t][c], (__m512bh)both, (__m512bh)rows[c]);
        }
    }
    if (whole < job->inputs) { /* the last input of an odd width has no neighbour */
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) {
            const __m512i both = _mm512_set1_epi32(x[t * stride + whole]);
#pragma GCC unroll 3
            for (int c = 0; c < panels; c++) {
                const __m512i rows = _mm512_load_si512(w + c * DEPTH * 16 + 16 * whole);
                held[t][c] = _mm512_dpbf16_ps(held[t][c], (__m512bh)both, (__m512bh)rows);
            }
        }
    }
#pragma GCC unroll 3
    for (int c = 0; c < panels; c++) {
        const int64_t left = job->rows - 16 * c;
        const __mmask16 inside = left >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << left) - 1);
        __m512 bias = _mm512_setzero_ps();
        if (job->bias) {
            const __m256i bits = _mm256_maskz_loadu_epi16(inside, job->bias + 16 * c);
            bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        }
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) {
            if (!job->last) {
                _mm512_store_ps(sums + t * ROWS + 16 * c, held[t][c]);
                continue;
            }
            const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(held[t][c], bias));
            _mm256_mask_storeu_epi16(job->out + (token + t) * job->out_stride + 16 * c, inside, rounded);
        }
    }
}

TARGET INLINE void tiles(const tile_job *job, int64_t tokens, const int panels) {
    int64_t token = 0;
    for (; token + TILE <= tokens; token += TILE) tile(job, token, TILE, panels);
    switch (tokens - token) {
        case 1: tile(job, token, 1, panels); break;
        case 2: tile(job, token, 2, panels); break;
        case 3: tile(job, token, 3, panels); break;
        case 4: tile(job, token, 4, panels); break;
        case 5: tile(job, token, 5, panels); break;
        case 6: tile(job, token, 6, panels); break;
        case 7: tile(job, token, 7, panels); break;
        default: break;
    }
}

TARGET static void run_task(const tiled_work *work, int64_t task, uint16_t *w, float *sums) {
    const product *p = work->p;
    const matrix *m = &p->m;
    const int64_t row = task % work->blocks * ROWS, token = task / work->blocks * work->tokens;
    const int64_t rows = m->rows - row < ROWS ? m->rows - row : ROWS;
    const int64_t tokens = p->columns - token < work->tokens ? p->columns - token : work->tokens;
    const int panels = (int)((rows + 15) / 16);
    int64_t at[ROWS];
    for (int64_t r = 0; r < rows; r++) at[r] = m->mask ? m->offsets[row + r] : 0;
    for (int64_t start = 0; start == 0 || start < m->width; start += DEPTH) {
        const int64_t inputs = m->width - start < DEPTH ? m->width - start : DEPTH;
        for (int c = 0; c < panels; c++)
            lay_out_panel(m, row + 16 * c, rows - 16 * c, work->words, start, (inputs + 31) / 32 * 32, at + 16 * c,
                          w + c * DEPTH * 16);
        const tile_job job = {.w = w,
                              .x = (const uint16_t *)p->x + token * p->x_stride + start,
                              .x_stride = p->x_stride,
                              .inputs = inputs,
                              .sums = sums,
                              .out = (uint16_t *)p->out + token * p->out_stride + row,
                              .out_stride = p->out_stride,
                              .rows = rows,
                              .bias = p->bias ? (const uint16_t *)p->bias + row : NULL,
                              .first = start == 0,
                              .last = start + DEPTH >= m->width};
        switch (panels) {
            case 1: tiles(&job, tokens, 1); break;
            case 2: tiles(&job, tokens, 2); break;
            default: tiles(&job, tokens, 3); break;
        }
    }
}

/* What a thread works in; its own for good, since memory that is handed out anew costs a page fault every 4 KiB. */
static _Thread_local struct {
    _Alignas(64) uint16_t w[ROWS * DEPTH];
    _Alignas(64) float sums[TOKENS * ROWS];
} scratch;

static void run_tasks(void *context, int64_t first, int64_t last) {
    for (int64_t task = first; task < last; task++) run_task(context, task, scratch.w, scratch.sums);
}

int matrix_product_tiled(const product *p, int threads, gomp_parallel pool) {
    tiled_work work = {.p = p, .words = (p->m.width + 63) / 64, .blocks = (p->m.rows + ROWS - 1) / ROWS};
    if (p->m.rows == 0 || p->columns == 0) return 0;
    /* Enough tasks for all threads; a split of the tokens costs another expansion of the weights. */
    int64_t splits = work.blocks >= 2 * threads ? 1 : (2 * threads + work.blocks - 1) / work.blocks;
    work.tokens = (p->columns + splits - 1) / splits;
    work.tokens = (work.tokens + TILE - 1) / TILE * TILE;
    if (work.tokens > TOKENS) work.tokens = TOKENS;
    const int64_t tasks = (p->columns + work.tokens - 1) / work.tokens * work.blocks;
    parallel_for(run_tasks, &work, tasks, 1, threads, pool);
    return 0;
}
#else
int matrix_product_tiled(const product *p, int threads, gomp_parallel pool) {
    (void)p, (void)threads, (void)pool;
    return -1;
}
#endif

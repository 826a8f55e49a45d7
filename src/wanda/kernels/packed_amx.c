/* Many columns (prefill) with AMX: a bfloat16 matrix product whose weights come out of the packed form on the way.

   TDPBF16PS adds 16 rows x 32 inputs times 32 inputs x 16 tokens to 16 x 16 sums. The weights are its left factor, since
   their inputs may lie as they come out of the mask; the tokens, of which there are fewer and which all tasks share, are
   laid out once, pairs of inputs of 16 tokens side by side. A task takes ROWS rows and some tokens: DEPTH inputs of its
   rows at a time are expanded into its second-level cache, and those of 32 tokens stay in the first while all rows pass
   by. The sums come out turned and are turned back. */
#include <stdlib.h>

#include "amx.h"
#include "packed_rows.h"
#include "transpose.h"

#ifdef WANDA_AMX

enum {
    INPUTS = 32,            /* of a tile */
    SIZE = 16 * INPUTS,     /* elements of a tile of bfloat16 */
    PAIRS = 4,              /* of tiles of 16 rows, */
    ROWS = 32 * PAIRS,      /* of a task */
    DEPTH = 640,            /* inputs expanded at a time at most; a multiple of 64 */
    TILES = DEPTH / INPUTS, /* of 16 rows then */
    GROUPS = 32,            /* of 16 tokens, of a task at most: their sums stay in cache */
    TOKENS = 8 * 16 * GROUPS, /* laid out at a time at most */
};

typedef struct {
    const product *p;
    uint16_t *x;    /* [groups of 16 tokens, tiles of 32 inputs, 16 pairs, 16 tokens] pairs, zero beyond the edges */
    int64_t words;  /* 64-bit mask words in a row */
    int64_t tiles;  /* of 32 inputs, of a whole row: two a word */
    int64_t blocks; /* of ROWS rows */
    int64_t groups; /* of 16 tokens, of a task */
    int64_t depth;  /* inputs expanded at a time */
} amx_work;

TARGET_AMX static void lay_out_tokens(void *context, int64_t first, int64_t last) {
    const amx_work *work = context;
    const product *p = work->p;
    for (int64_t group = first; group < last; group++) {
        const uint16_t *x = (const uint16_t *)p->x + 16 * group * p->x_stride;
        uint16_t *to = work->x + group * work->tiles * SIZE;
        const int64_t tokens = p->columns - 16 * group;
        for (int64_t j = 0; j < work->tiles * INPUTS; j += INPUTS, to += SIZE) {
            const int64_t left = p->m.width - j;
            const __mmask32 inside = left >= INPUTS ? 0xffffffffu : left > 0 ? (1u << left) - 1 : 0;
            __m512i lanes[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                lanes[i] = i < tokens ? _mm512_maskz_loadu_epi16(inside, x + i * p->x_stride + j) : _mm512_setzero_si512();
            transpose(lanes);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) _mm512_store_si512(to + INPUTS * i, lanes[i]);
        }
    }
}

/* Inputs [start, start + depth) of 16 rows, those beyond `rows` zero, as tiles [depth / 32, 16, 32]. at[i], where the
   values of row i go on, moves on by those taken. */
TARGET_AMX INLINE void expand_tiles(const matrix *m, int64_t row, int64_t rows, int64_t words, int64_t start,
                                    int64_t depth, int64_t *at, uint16_t *to) {
    const uint16_t *values = m->values;
    for (int64_t i = 0; i < 16; i++, to += INPUTS) {
        if (i >= rows) {
            for (int64_t j = 0; j < depth; j += INPUTS) _mm512_store_si512(to + 16 * j, _mm512_setzero_si512());
        } else if (m->mask) {
            const uint64_t *mask = m->mask + (row + i) * words + start / 64;
            const uint16_t *from = values + at[i];
            for (int64_t j = 0; j < depth; j += 64) {
                const uint64_t bits = mask[j / 64];
                const int low = __builtin_popcount((uint32_t)bits);
                _mm512_store_si512(to + 16 * j, _mm512_maskz_expand_epi16((uint32_t)bits, _mm512_loadu_si512(from)));
                from += low;
                const uint32_t high = (uint32_t)(bits >> 32);
                _mm512_store_si512(to + 16 * j + SIZE, _mm512_maskz_expand_epi16(high, _mm512_loadu_si512(from)));
                from += __builtin_popcount(high);
            }
            at[i] = from - values;
        } else {
            const uint16_t *from = values + (row + i) * m->width + start;
            for (int64_t j = 0; j < depth; j += INPUTS) {
                const int64_t left = m->width - start - j;
                const __mmask32 inside = left >= INPUTS ? 0xffffffffu : left > 0 ? (1u << left) - 1 : 0;
                _mm512_store_si512(to + 16 * j, _mm512_maskz_loadu_epi16(inside, from + j));
            }
        }
    }
}

/* What two groups of tokens read and write. */
typedef struct {
    const uint16_t *w; /* [2, TILES] tiles of 16 rows */
    const uint16_t *x; /* [2 groups, tiles of a row] from this slab's first on, `apart` elements between the groups */
    int64_t apart, tiles; /* tiles of this slab */
    float *sums;          /* [4] tiles of 16 rows x 16 tokens; read unless `first`, written */
    int first;
} amx_job;

/* Numbers of tiles are part of the instructions: `rows` and `groups`, 1 or 2, are constants where this is compiled. */
TARGET_AMX INLINE void multiply_tiles(const amx_job *job, const int rows, const int groups) {
    float *sums = job->sums;
    if (job->first) {
        _tile_zero(0);
        if (groups == 2) _tile_zero(1);
        if (rows == 2) _tile_zero(2);
        if (rows == 2 && groups == 2) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        if (groups == 2) _tile_loadd(1, sums + 256, 64);
        if (rows == 2) _tile_loadd(2, sums + 512, 64);
        if (rows == 2 && groups == 2) _tile_loadd(3, sums + 768, 64);
    }
    const uint16_t *w = job->w, *x = job->x;
    for (int64_t k = 0; k < job->tiles; k++, w += SIZE, x += SIZE) {
        _tile_loadd(4, w, 64);
        _tile_loadd(6, x, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (groups == 2) {
            _tile_loadd(7, x + job->apart, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (rows == 2) {
            _tile_loadd(5, w + TILES * SIZE, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (groups == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    if (groups == 2) _tile_stored(1, sums + 256, 64);
    if (rows == 2) _tile_stored(2, sums + 512, 64);
    if (rows == 2 && groups == 2) _tile_stored(3, sums + 768, 64);
}

/* Sums [16 rows, 16 tokens] plus bias, rounded, to out [tokens, rows]; at most 16 of both are inside. */
TARGET_AMX INLINE void store_tile(const product *p, const float *sums, int64_t row, int64_t token) {
    const int64_t rows = p->m.rows - row, tokens = p->columns - token;
    const __mmask16 inside = rows >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << rows) - 1);
    __m512 bias = _mm512_setzero_ps();
    if (p->bias) {
        const __m256i bits = _mm256_maskz_loadu_epi16(inside, (const uint16_t *)p->bias + row);
        bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    __m512i lanes[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) lanes[i] = _mm512_load_si512(sums + 16 * i);
    transpose(lanes);
    uint16_t *out = (uint16_t *)p->out + token * p->out_stride + row;
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        if (i < tokens) {
            const __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(lanes[i]), bias);
            _mm256_mask_storeu_epi16(out + i * p->out_stride, inside, (__m256i)_mm512_cvtneps_pbh(sum));
        }
}

/* What a thread works in; its own for good, since memory that is handed out anew costs a page fault every 4 KiB. */
static _Thread_local struct {
    _Alignas(64) uint16_t w[2 * PAIRS][TILES * SIZE];
    _Alignas(64) float sums[GROUPS / 2][PAIRS][4 * 256];
} scratch;

TARGET_AMX static void run_task(const amx_work *work, int64_t task) {
    const product *p = work->p;
    const matrix *m = &p->m;
    const int64_t row = task % work->blocks * ROWS, group = task / work->blocks * work->groups;
    const int64_t all = (p->columns + 15) / 16, groups = all - group < work->groups ? all - group : work->groups;
    const int64_t rows = m->rows - row < ROWS ? m->rows - row : ROWS, apart = work->tiles * SIZE;
    int64_t at[ROWS];
    for (int64_t i = 0; i < rows; i++) at[i] = m->mask ? m->offsets[row + i] : 0;
    for (int64_t start = 0; start == 0 || start < m->width; start += work->depth) {
        const int64_t left = work->tiles * INPUTS - start, depth = left < work->depth ? left : work->depth;
        for (int64_t i = 0; i < rows; i += 16)
            expand_tiles(m, row + i, rows - i, work->words, start, depth, at + i, scratch.w[i / 16]);
        tiles_read_memory();
        for (int64_t g = 0; g < groups; g += 2)
            for (int64_t i = 0; i < rows; i += 32) {
                float *sums = scratch.sums[g / 2][i / 32];
                const amx_job job = {.w = scratch.w[i / 16],
                                     .x = work->x + (group + g) * apart + start * 16,
                                     .apart = apart,
                                     .tiles = depth / INPUTS,
                                     .sums = sums,
                                     .first = start == 0};
                const int two_rows = i + 16 < rows, two_groups = g + 1 < groups;
                if (two_rows && two_groups)
                    multiply_tiles(&job, 2, 2);
                else if (two_rows)
                    multiply_tiles(&job, 2, 1);
                else if (two_groups)
                    multiply_tiles(&job, 1, 2);
                else
                    multiply_tiles(&job, 1, 1);
                if (start + work->depth < m->width) continue;
                for (int a = 0; a <= two_rows; a++)
                    for (int b = 0; b <= two_groups; b++)
                        store_tile(p, sums + 256 * (2 * a + b), row + i + 16 * a, 16 * (group + g + b));
            }
    }
}

TARGET_AMX static void run_tasks(void *context, int64_t first, int64_t last) {
    const tile_shapes before = begin_tiles();
    for (int64_t task = first; task < last; task++) run_task(context, task);
    end_tiles(&before);
}

int matrix_product_amx(const product *p, int threads, gomp_parallel pool) {
    if (p->m.rows == 0 || p->columns == 0) return 0;
    if (threads < 1) threads = 1;
    product piece = *p;
    const int64_t words = (p->m.width + 63) / 64, blocks = (p->m.rows + ROWS - 1) / ROWS;
    amx_work work = {.p = &piece, .words = words, .tiles = 2 * words, .blocks = blocks};
    /* A long prompt goes in pieces, whose copies stay in the cache and take no memory worth speaking of: as many tokens as
       give each thread eight full tasks, or those that are done would wait for the others too often. */
    const int64_t tasks = (8 * (int64_t)threads + blocks - 1) / blocks, step = 16 * GROUPS * tasks;
    const int64_t most = step < TOKENS ? step : TOKENS, longest = p->columns < most ? p->columns : most;
    const int64_t turns = (64 * words + DEPTH - 1) / DEPTH; /* alike, since each costs the sums another way to memory */
    work.depth = turns ? (words + turns - 1) / turns * 64 : DEPTH;
    work.x = aligned_alloc(64, (size_t)((longest + 15) / 16 * work.tiles * SIZE) * sizeof *work.x + 64);
    if (!work.x) return -1;
    /* Enough tasks for all threads; a split of the tokens costs another expansion of the weights. */
    const int64_t splits = blocks >= 2 * threads ? 1 : (2 * threads + blocks - 1) / blocks;
    for (int64_t token = 0; token < p->columns; token += most) {
        piece.x = (const uint16_t *)p->x + token * p->x_stride;
        piece.out = (uint16_t *)p->out + token * p->out_stride;
        piece.columns = p->columns - token < most ? p->columns - token : most;
        const int64_t groups = (piece.columns + 15) / 16;
        work.groups = ((groups + splits - 1) / splits + 1) / 2 * 2;
        if (work.groups > GROUPS) work.groups = GROUPS;
        parallel_for(lay_out_tokens, &work, groups, 1, threads, pool);
        parallel_for(run_tasks, &work, (groups + work.groups - 1) / work.groups * blocks, 1, threads, pool);
    }
    free(work.x);
    return 0;
}
#else
int matrix_product_amx(const product *p, int threads, gomp_parallel pool) {
    (void)p, (void)threads, (void)pool;
    return -1;
}
#endif

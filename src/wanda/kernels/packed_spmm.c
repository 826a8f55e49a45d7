/* Many columns (prefill) where only float32 multiplies fast: a product that skips the weights that were removed.

   A task takes some rows of the matrix and up to TOKENS tokens. 64 inputs of its tokens at a time, as many as a word of
   the mask has bits, are turned into its first-level cache ([inputs, tokens]); then every survivor of a row is
   multiplied with one input of all tokens, whose sums are in registers. So half the weights take half the
   multiplications, which no dense product can do; reading the mask bit by bit is paid once for all tokens. */
#include "packed_rows.h"

#ifdef WANDA_X86
#define TARGET __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt")))

enum {
    VECTORS = 8, /* of eight tokens, in registers; more gain nothing and leave less of the cache */
    TOKENS = 8 * VECTORS,
    DEPTH = 64, /* inputs at a time: the bits of a word of the mask */
    ROWS = 512, /* of a task at most: their sums stay in the second-level cache */
};

typedef struct {
    const product *p;
    int64_t words;  /* 64-bit mask words in a row */
    int64_t blocks; /* of rows */
    int64_t rows;   /* of a block, a multiple of 8 */
    int64_t tokens; /* of a task, a multiple of 8 */
} spmm_work;

/* What a thread works in; its own for good, since memory that is handed out anew costs a page fault every 4 KiB. */
static _Thread_local struct {
    _Alignas(64) float x[DEPTH * TOKENS];   /* [inputs, tokens] */
    _Alignas(64) float sums[ROWS * TOKENS]; /* [rows, tokens] */
} scratch;

/* lanes[i] lane j becomes lanes[j] lane i. */
TARGET INLINE void transpose(__m256 lanes[8]) {
    __m256 a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_ps(lanes[2 * i], lanes[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_ps(lanes[2 * i], lanes[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) { /* b[4 i + j]: columns j and j + 4 of rows 4 i .. 4 i + 3 */
        b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
        b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
        b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
        b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        lanes[j] = _mm256_permute2f128_ps(b[j], b[4 + j], 0x20);
        lanes[4 + j] = _mm256_permute2f128_ps(b[j], b[4 + j], 0x31);
    }
}

/* Eight elements of a kind as float32. */
TARGET INLINE __m256 load8(int kind, const void *from, int64_t at) {
    if (kind == KIND_F32) return _mm256_loadu_ps((const float *)from + at);
    const __m128i bits = _mm_loadu_si128((const __m128i *)((const uint16_t *)from + at));
    if (kind == KIND_F16) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

/* The first `count` of eight elements; zeros behind them. */
TARGET INLINE __m256 load_some(int kind, const void *from, int64_t at, int64_t count) {
    if (count >= 8) return load8(kind, from, at);
    float some[8] = {0};
    for (int64_t i = 0; i < count; i++) some[i] = load_value(kind, from, at + i);
    return _mm256_loadu_ps(some);
}

/* Inputs [start, start + DEPTH) of a task's tokens, as far as there are any, to [inputs, 8 vectors]; zeros for tokens
   that are not there. */
TARGET INLINE void lay_out(const product *p, int64_t token, int64_t tokens, int64_t start, float *to, const int vectors) {
    const int64_t inputs = p->m.width - start < DEPTH ? p->m.width - start : DEPTH;
    for (int64_t t = 0; t < 8 * vectors; t += 8) {
        for (int64_t j = 0; j < inputs; j += 8) {
            __m256 lanes[8];
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++)
                lanes[i] = t + i < tokens
                               ? load_some(p->kind, p->x, (token + t + i) * p->x_stride + start + j, inputs - j)
                               : _mm256_setzero_ps();
            transpose(lanes);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) _mm256_store_ps(to + (j + i) * 8 * vectors + t, lanes[i]);
        }
    }
}

/* The sums of rows [row, row + 8) as far as there are any, with the bias, to the result. */
TARGET INLINE void store_rows(const product *p, int64_t row, int64_t token, int64_t tokens, const float *sums,
                              const int vectors) {
    const int64_t left = p->m.rows - row;
    const __m256 bias = p->bias ? load_some(p->kind, p->bias, row, left) : _mm256_setzero_ps();
    for (int64_t t = 0; t < tokens; t += 8) {
        __m256 lanes[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) lanes[i] = _mm256_load_ps(sums + i * 8 * vectors + t);
        transpose(lanes);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            if (t + i >= tokens) break;
            const int64_t at = (token + t + i) * p->out_stride + row;
            const __m256 sum = _mm256_add_ps(lanes[i], bias);
            if (p->kind == KIND_F32 && left >= 8) {
                _mm256_storeu_ps((float *)p->out + at, sum);
            } else {
                float some[8];
                _mm256_storeu_ps(some, sum);
                for (int64_t r = 0; r < 8 && r < left; r++) store_value(p->kind, p->out, at + r, some[r]);
            }
        }
    }
}

/* A task: rows [row, row + rows) and tokens [token, token + tokens) of the product. */
typedef struct {
    const product *p;
    int64_t row, rows, token, tokens, words;
    float *x, *sums; /* scratch memory, reached from here: the compiler looks a thread's own variable up for every use */
    int64_t at[ROWS]; /* where the values of each row go on */
} spmm_task;

/* Adds the survivors of a word of the mask of each row, times their inputs, to the sums of all tokens. */
TARGET INLINE void add_survivors(spmm_task *task, int64_t word, const int vectors) {
    const matrix *m = &task->p->m;
    for (int64_t r = 0; r < task->rows; r++) {
        const float *x = task->x;
        float *sums = task->sums + r * 8 * vectors;
        uint64_t bits = m->mask[(task->row + r) * task->words + word];
        const int64_t count = __builtin_popcountll(bits), at = task->at[r];
        _Alignas(32) float converted[DEPTH];
        const float *w = converted;
        if (m->kind == KIND_F32)
            w = (const float *)m->values + at;
        else
            for (int64_t i = 0; i < count; i += 8) _mm256_store_ps(converted + i, load8(m->kind, m->values, at + i));
        task->at[r] = at + count;
        __m256 held[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) held[v] = _mm256_load_ps(sums + 8 * v);
        while (bits) {
            const float *input = x + _tzcnt_u64(bits) * (uint64_t)(8 * vectors);
            const __m256 weight = _mm256_broadcast_ss(w++);
            bits = _blsr_u64(bits);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) held[v] = _mm256_fmadd_ps(weight, _mm256_load_ps(input + 8 * v), held[v]);
        }
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) _mm256_store_ps(sums + 8 * v, held[v]);
    }
}

TARGET INLINE void run_with(spmm_task *task, const int vectors) {
    const product *p = task->p;
    for (int64_t r = 0; r < task->rows; r++) task->at[r] = p->m.offsets[task->row + r];
    memset(task->sums, 0, (size_t)((task->rows + 7) / 8 * 8 * 8 * vectors) * sizeof *task->sums);
    for (int64_t word = 0; word < task->words; word++) {
        lay_out(p, task->token, task->tokens, DEPTH * word, task->x, vectors);
        add_survivors(task, word, vectors);
    }
    for (int64_t r = 0; r < task->rows; r += 8)
        store_rows(p, task->row + r, task->token, task->tokens, task->sums + r * 8 * vectors, vectors);
}

/* A function for each number of vectors: in one, the compiler keeps no sums in registers. */
#define RUN(vectors) \
    TARGET __attribute__((noinline)) static void run_##vectors(spmm_task *task) { run_with(task, vectors); }
RUN(1) RUN(2) RUN(3) RUN(4) RUN(5) RUN(6) RUN(7) RUN(8)
static void (*const RUNS[])(spmm_task *) = {run_1, run_2, run_3, run_4, run_5, run_6, run_7, run_8};

static void run_tasks(void *context, int64_t first, int64_t last) {
    const spmm_work *work = context;
    const product *p = work->p;
    spmm_task task = {.p = p, .words = work->words, .x = scratch.x, .sums = scratch.sums};
    for (int64_t i = first; i < last; i++) {
        task.row = i % work->blocks * work->rows;
        task.rows = p->m.rows - task.row < work->rows ? p->m.rows - task.row : work->rows;
        task.token = i / work->blocks * work->tokens;
        task.tokens = p->columns - task.token < work->tokens ? p->columns - task.token : work->tokens;
        RUNS[(task.tokens - 1) / 8](&task);
    }
}

static int64_t share_of(int64_t all, int64_t parts) { return ((all + parts - 1) / parts + 7) / 8 * 8; }

int matrix_product_spmm(const product *p, int threads, gomp_parallel pool) {
    spmm_work work = {.p = p, .words = (p->m.width + 63) / 64};
    if (p->m.rows == 0 || p->columns == 0) return 0;
    const int64_t turns = (p->columns + TOKENS - 1) / TOKENS;
    work.tokens = share_of(p->columns, turns);
    /* Enough tasks that threads which are done help the others, but 64 rows, or laying out the tokens shows. */
    int64_t blocks = (p->m.rows + ROWS - 1) / ROWS;
    const int64_t wanted = threads > 1 ? (4 * threads + turns - 1) / turns : 1, most = p->m.rows / 64;
    const int64_t smaller = wanted < most ? wanted : most;
    if (blocks < smaller) blocks = smaller;
    work.rows = share_of(p->m.rows, blocks);
    work.blocks = (p->m.rows + work.rows - 1) / work.rows;
    const int64_t tasks = (p->columns + work.tokens - 1) / work.tokens * work.blocks;
    parallel_for(run_tasks, &work, tasks, 1, threads, pool);
    return 0;
}
#else
int matrix_product_spmm(const product *p, int threads, gomp_parallel pool) {
    (void)p, (void)threads, (void)pool;
    return -1;
}
#endif

/* Many columns (prefill) where only float32 multiplies fast: a product that skips the weights that were removed.

   A task takes some rows of the matrix and up to 64 tokens (AVX2) or 128 (AVX-512). 64 inputs of its tokens at a time, as
   many as a word of the mask has bits, are turned into its first-level cache ([inputs, tokens]); then every survivor of a row
   is multiplied with one input of all tokens, whose sums are in registers. So half the weights take half the
   multiplications, which no dense product can do; reading the mask bit by bit is paid once for all tokens.

   AVX2 and AVX-512 differ in the loop over survivors alone; tokens and sums are turned by AVX2 for both. */
#include "packed_rows.h"

#ifdef WANDA_X86
#define TARGET __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt")))
#define TARGET_512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt")))

enum {
    VECTORS = 8,           /* of tokens, in registers; more gain nothing and leave less of the first-level cache */
    TOKENS = 16 * VECTORS, /* of a task at most */
    DEPTH = 64,            /* inputs at a time: the bits of a word of the mask */
    ROWS = 768,            /* of a task at most: their sums stay in the second-level cache */
};

/* What a thread works in; its own for good, since memory that is handed out anew costs a page fault every 4 KiB. */
static _Thread_local struct {
    _Alignas(64) float x[DEPTH * TOKENS];   /* [inputs, tokens] */
    _Alignas(64) float sums[ROWS * TOKENS]; /* [rows, tokens] */
} scratch;

/* A task: rows [row, row + rows) and tokens [token, token + tokens) of the product. */
typedef struct {
    const product *p;
    int64_t row, rows, token, tokens, words;
    float *x, *sums; /* scratch memory, reached from here: the compiler looks a thread's own variable up for every use */
    int64_t at[ROWS]; /* where the values of each row go on */
} spmm_task;

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

/* The inputs of a word of the mask, as far as there are any, to [inputs, room for tokens]; zeros for tokens that are not
   there. */
TARGET INLINE void lay_out(const spmm_task *task, int64_t word, const int room) {
    const product *p = task->p;
    const int64_t start = DEPTH * word, inputs = p->m.width - start < DEPTH ? p->m.width - start : DEPTH;
    for (int64_t t = 0; t < room; t += 8) {
        for (int64_t j = 0; j < inputs; j += 8) {
            __m256 lanes[8];
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++)
                lanes[i] = t + i < task->tokens
                               ? load_some(p->kind, p->x, (task->token + t + i) * p->x_stride + start + j, inputs - j)
                               : _mm256_setzero_ps();
            transpose(lanes);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) _mm256_store_ps(task->x + (j + i) * room + t, lanes[i]);
        }
    }
}

/* Eight sums as elements of a kind. */
TARGET INLINE void store8(int kind, void *to, int64_t at, __m256 sums) {
    if (kind == KIND_F32) {
        _mm256_storeu_ps((float *)to + at, sums);
        return;
    }
    __m128i halves;
    if (kind == KIND_F16) {
        halves = _mm256_cvtps_ph(sums, _MM_FROUND_TO_NEAREST_INT);
    } else { /* to_bf16 */
        const __m256i bits = _mm256_castps_si256(sums), high = _mm256_srli_epi32(bits, 16), one = _mm256_set1_epi32(1);
        const __m256i up = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(high, one));
        const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(sums, sums, _CMP_UNORD_Q));
        const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
        halves = _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
    }
    _mm_storeu_si128((__m128i *)((uint16_t *)to + at), halves);
}

/* The sums of a task's rows [first, first + 16) as far as there are any, with the bias, to the result: as many as fill a
   line of the cache, which would be fetched again for the others. */
TARGET INLINE void store_rows(const spmm_task *task, int64_t first, const int room) {
    const product *p = task->p;
    for (int64_t t = 0; t < task->tokens; t += 8) {
        for (int64_t r = first; r < first + 16 && r < task->rows; r += 8) {
            const int64_t row = task->row + r, left = p->m.rows - row;
            const __m256 bias = p->bias ? load_some(p->kind, p->bias, row, left) : _mm256_setzero_ps();
            __m256 lanes[8];
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) lanes[i] = _mm256_load_ps(task->sums + (r + i) * room + t);
            transpose(lanes);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                if (t + i >= task->tokens) break;
                const int64_t at = (task->token + t + i) * p->out_stride + row;
                const __m256 sum = _mm256_add_ps(lanes[i], bias);
                if (left >= 8) {
                    store8(p->kind, p->out, at, sum);
                } else {
                    float some[8];
                    _mm256_storeu_ps(some, sum);
                    for (int64_t j = 0; j < left; j++) store_value(p->kind, p->out, at + j, some[j]);
                }
            }
        }
    }
}

/* Asks memory for what no processor foresees: the values that a row goes on with after all other rows, and, once they are
   nearer, those of a row soon after it. */
TARGET INLINE void ask_ahead(const spmm_task *task, int64_t r, int64_t word) {
    const matrix *m = &task->p->m;
    const char *next = value_at(m, task->at[r]), *soon = value_at(m, task->at[r + 4 < task->rows ? r + 4 : r]);
    _mm_prefetch((const char *)(m->mask + (task->row + r) * task->words + word + 2), _MM_HINT_T1);
#pragma GCC unroll 3
    for (int i = 0; i < 192; i += 64) _mm_prefetch(next + i, _MM_HINT_T1);
#pragma GCC unroll 2
    for (int i = 0; i < 128; i += 64) _mm_prefetch(soon + i, _MM_HINT_T0);
}

/* The survivors of a word of the mask of a row as float32; the row goes on behind them. */
TARGET INLINE const float *take_survivors(spmm_task *task, int64_t r, int64_t word, uint64_t bits, float *converted) {
    const matrix *m = &task->p->m;
    const int64_t count = __builtin_popcountll(bits), at = task->at[r];
    task->at[r] = at + count;
    ask_ahead(task, r, word);
    if (m->kind == KIND_F32) return (const float *)m->values + at;
    for (int64_t i = 0; i < count; i += 8) _mm256_storeu_ps(converted + i, load8(m->kind, m->values, at + i));
    return converted;
}

/* Adds the survivors of a word of the mask of each row, times their inputs, to the sums of all tokens. */
TARGET INLINE void avx2_add(spmm_task *task, int64_t word, const int vectors) {
    for (int64_t r = 0; r < task->rows; r++) {
        const float *x = task->x;
        float *sums = task->sums + r * 8 * vectors, converted[DEPTH];
        uint64_t bits = task->p->m.mask[(task->row + r) * task->words + word];
        const float *w = take_survivors(task, r, word, bits, converted);
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

/* The same. Two rows at a time, which share what they load, and several sums for few tokens were no faster. */
TARGET_512 INLINE void avx512_add(spmm_task *task, int64_t word, const int vectors) {
    for (int64_t r = 0; r < task->rows; r++) {
        const float *x = task->x;
        float *sums = task->sums + r * 16 * vectors, converted[DEPTH];
        uint64_t bits = task->p->m.mask[(task->row + r) * task->words + word];
        const float *w = take_survivors(task, r, word, bits, converted);
        __m512 held[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) held[v] = _mm512_load_ps(sums + 16 * v);
        while (bits) {
            const float *input = x + _tzcnt_u64(bits) * (uint64_t)(16 * vectors);
            const __m512 weight = _mm512_set1_ps(*w++);
            bits = _blsr_u64(bits);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) held[v] = _mm512_fmadd_ps(weight, _mm512_load_ps(input + 16 * v), held[v]);
        }
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) _mm512_store_ps(sums + 16 * v, held[v]);
    }
}

/* A function for each number of vectors of a level: in one, the compiler keeps no sums in registers. */
#define RUN(level, target, lanes, vectors)                                                                            \
    target __attribute__((noinline)) static void level##_##vectors(spmm_task *task) {                                 \
        for (int64_t r = 0; r < task->rows; r++) task->at[r] = task->p->m.offsets[task->row + r];                     \
        memset(task->sums, 0, (size_t)((task->rows + 7) / 8 * 8 * lanes * vectors) * sizeof *task->sums);             \
        for (int64_t word = 0; word < task->words; word++) {                                                          \
            lay_out(task, word, lanes * vectors);                                                                     \
            level##_add(task, word, vectors);                                                                         \
        }                                                                                                             \
        for (int64_t r = 0; r < task->rows; r += 16) store_rows(task, r, lanes * vectors);                            \
    }
#define RUNS(level, target, lanes)                                                                                    \
    RUN(level, target, lanes, 1) RUN(level, target, lanes, 2) RUN(level, target, lanes, 3) RUN(level, target, lanes, 4)\
    RUN(level, target, lanes, 5) RUN(level, target, lanes, 6) RUN(level, target, lanes, 7) RUN(level, target, lanes, 8)\
    static void (*const level##_runs[VECTORS])(spmm_task *) = {level##_1, level##_2, level##_3, level##_4,            \
                                                               level##_5, level##_6, level##_7, level##_8};
RUNS(avx2, TARGET, 8)
RUNS(avx512, TARGET_512, 16)

typedef struct {
    const product *p;
    int64_t words;  /* 64-bit mask words in a row */
    int64_t blocks; /* of rows */
    int64_t rows;   /* of a block, a multiple of 16 */
    int64_t tokens; /* of a task, a multiple of the lanes */
    int lanes;      /* of a vector */
    void (*const *runs)(spmm_task *); /* for each number of vectors */
} spmm_work;

static void run_tasks(void *context, int64_t first, int64_t last) {
    const spmm_work *work = context;
    const product *p = work->p;
    spmm_task task = {.p = p, .words = work->words, .x = scratch.x, .sums = scratch.sums};
    for (int64_t i = first; i < last; i++) {
        task.row = i % work->blocks * work->rows;
        task.rows = p->m.rows - task.row < work->rows ? p->m.rows - task.row : work->rows;
        task.token = i / work->blocks * work->tokens;
        task.tokens = p->columns - task.token < work->tokens ? p->columns - task.token : work->tokens;
        work->runs[(task.tokens - 1) / work->lanes](&task);
    }
}

/* What one of some parts takes of all, rounded up to a multiple. */
static int64_t share_of(int64_t all, int64_t parts, int64_t multiple) {
    return ((all + parts - 1) / parts + multiple - 1) / multiple * multiple;
}

int matrix_product_spmm(const product *p, int level, int threads, gomp_parallel pool) {
    const int wide = level >= LEVEL_AVX512;
    spmm_work work = {.p = p, .words = (p->m.width + 63) / 64, .lanes = wide ? 16 : 8};
    work.runs = wide ? avx512_runs : avx2_runs;
    if (p->m.rows == 0 || p->columns == 0) return 0;
    const int64_t room = work.lanes * VECTORS, turns = (p->columns + room - 1) / room;
    work.tokens = share_of(p->columns, turns, work.lanes);
    /* Enough tasks that threads which are done help the others, but 64 rows, or laying out the tokens shows. */
    int64_t blocks = (p->m.rows + ROWS - 1) / ROWS;
    const int64_t wanted = threads > 1 ? (4 * threads + turns - 1) / turns : 1, most = p->m.rows / 64;
    const int64_t smaller = wanted < most ? wanted : most;
    if (blocks < smaller) blocks = smaller;
    work.rows = share_of(p->m.rows, blocks, 16);
    work.blocks = (p->m.rows + work.rows - 1) / work.rows;
    const int64_t tasks = (p->columns + work.tokens - 1) / work.tokens * work.blocks;
    parallel_for(run_tasks, &work, tasks, 1, threads, pool);
    return 0;
}
#else
int matrix_product_spmm(const product *p, int level, int threads, gomp_parallel pool) {
    (void)p, (void)level, (void)threads, (void)pool;
    return -1;
}
#endif

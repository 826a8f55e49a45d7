/* The entry points: choose the kernel, lay x out for it, share the rows among threads. */
#include <stdlib.h>

#include "packed_rows.h"

static const int SIZES[] = {1, 2, 3, 4, 6, 8, 12, 16}; /* numbers of columns the kernels are compiled for */

static int64_t rows_per_chunk(int64_t rows, int64_t bytes_per_row, int threads) {
    const int64_t enough = (64 << 10) / (bytes_per_row + 1) + 1; /* less is not worth a thread's attention */
    const int64_t share = rows / (8 * (int64_t)threads) + 1;
    return share > enough ? share : enough;
}

static void lay_out(const product *p, void *to, int lane, int columns, int as_float, int split) {
    const int64_t padded = (p->m.width + 63) / 64 * 64;
    const size_t size = as_float ? 4 : 2;
    memset(to, 0, (size_t)(padded * columns) * size);
    for (int64_t c = 0; c < p->columns; c++) {
        for (int64_t start = 0; start < p->m.width; start += lane) {
            const int64_t count = p->m.width - start < lane ? p->m.width - start : lane;
            const int64_t from = c * p->x_stride + start, place = start * columns + c * lane;
            if (split) {
                for (int64_t j = 0; j < count; j++)
                    ((float *)to)[place + j / 2 + j % 2 * (lane / 2)] = load_value(p->kind, p->x, from + j);
            } else if (as_float) {
                for (int64_t j = 0; j < count; j++) ((float *)to)[place + j] = load_value(p->kind, p->x, from + j);
            } else {
                memcpy((uint16_t *)to + place, (const uint16_t *)p->x + from, (size_t)count * 2);
            }
        }
    }
}

typedef struct {
    rows_job job;
    rows_kernel kernel;
} rows_work;

static void run_rows(void *context, int64_t first, int64_t last) {
    const rows_work *work = context;
    work->kernel(&work->job, first, last);
}

int skipping_pays(const matrix *m, int level) {
    const int64_t tenths = level >= LEVEL_AVX512 ? 6 : 7;
    return 10 * (int64_t)m->offsets[m->rows] <= tenths * m->rows * m->width;
}

int matrix_product(const product *p, int level, int threads, gomp_parallel pool) {
    const matrix *m = &p->m;
    const int in_bf16 = level >= LEVEL_AVX512_BF16 && m->kind == KIND_BF16 && p->kind == KIND_BF16;
    if (in_bf16 && level >= LEVEL_AMX && p->columns > (m->mask ? AMX_COLUMNS : FEW_COLUMNS))
        return matrix_product_amx(p, threads, pool);
    if (in_bf16 && p->columns > FEW_COLUMNS) return matrix_product_tiled(p, threads, pool);
    const int some = level == LEVEL_AVX2 && p->columns > SOME_COLUMNS && skipping_pays(m, level);
    if (level >= LEVEL_AVX2 && (some || p->columns > MOST_COLUMNS))
        return matrix_product_spmm(p, level, threads, pool);
    rows_work work = {.job = {.p = p, .words = (m->width + 63) / 64, .stored = (int)p->columns}};
    int lane = 1, as_float = 1, split = 0;
    work.kernel = portable_rows;
#ifdef WANDA_X86
    if (level >= LEVEL_AVX512) {
        work.kernel = avx512_rows;
        lane = 16;
    } else if (level == LEVEL_AVX2) {
        work.kernel = avx2_rows;
        lane = 8;
        split = m->kind == KIND_BF16;
    }
#ifdef WANDA_BF16
    if (in_bf16) {
        work.kernel = avx512_bf16_rows;
        lane = 32;
        as_float = 0;
    }
#endif
#else
    (void)level;
#endif
    const int *size = SIZES;
    while (*size < p->columns) size++;
    work.job.columns = *size;
    void *copy = NULL;
    const int in_place = p->columns == 1 && m->width % 64 == 0 && !split && (p->kind == KIND_F32 || !as_float);
    if (in_place) {
        work.job.x = p->x;
    } else {
        copy = malloc((size_t)(work.job.words * 64 * work.job.columns) * 4 + 1);
        if (!copy) return -1;
        lay_out(p, copy, lane, work.job.columns, as_float, split);
        work.job.x = copy;
    }
    parallel_for(run_rows, &work, m->rows, rows_per_chunk(m->rows, m->width, threads), threads, pool);
    free(copy);
    return 0;
}

typedef struct {
    const matrix *m;
    int kind;
    char *out;
    int64_t first, row_bytes;
    expand_kernel kernel;
} expand_work;

static void run_expand(void *context, int64_t first, int64_t last) {
    const expand_work *work = context;
    for (int64_t i = first; i < last; i++)
        work->kernel(work->m, work->first + i, work->kind, work->out + i * work->row_bytes);
}

void expand_rows(const matrix *m, int64_t first, int64_t last, int kind, void *out, int level, int threads,
                 gomp_parallel pool) {
    expand_work work = {m, kind, out, first, m->width * (kind == KIND_F32 ? 4 : 2), portable_expand};
#ifdef WANDA_X86
    if (level >= LEVEL_AVX512)
        work.kernel = avx512_expand;
    else if (level == LEVEL_AVX2)
        work.kernel = avx2_expand;
#ifdef WANDA_BF16
    if (level >= LEVEL_AVX512_BF16 && kind != KIND_F32) work.kernel = avx512_bf16_expand;
#endif
#else
    (void)level;
#endif
    parallel_for(run_expand, &work, last - first, rows_per_chunk(last - first, m->width, threads), threads, pool);
}

typedef struct {
    const matrix *m;
    int64_t capacity;
    int64_t (*count)(const uint64_t *, int64_t);
    _Atomic int64_t bad;
} check_work;

static void run_check(void *context, int64_t first, int64_t last) {
    check_work *work = context;
    const matrix *m = work->m;
    const int64_t words = (m->width + 63) / 64;
    const uint64_t beyond = m->width % 64 ? ~0ull << m->width % 64 : 0;
    for (int64_t row = first; row < last; row++) {
        const uint64_t *mask = m->mask + row * words;
        const int64_t survivors = work->count(mask, words);
        const int64_t start = m->offsets[row], end = m->offsets[row + 1];
        if (end - start != survivors || end + SLACK > work->capacity || (words && mask[words - 1] & beyond)) {
            int64_t before = work->bad;
            while ((before < 0 || row < before) && !__atomic_compare_exchange_n(
                       (int64_t *)&work->bad, &before, row, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
            }
            return;
        }
    }
}

int64_t first_bad_row(const matrix *m, int64_t capacity, int threads, gomp_parallel pool) {
    check_work work = {.m = m, .capacity = capacity, .count = portable_count, .bad = -1};
#ifdef WANDA_X86
    if (best_level() >= LEVEL_AVX2) work.count = avx2_count; /* the instruction, which plain x86-64 lacks */
#endif
    if (m->offsets[0] != 0 || capacity < SLACK) return 0;
    parallel_for(run_check, &work, m->rows, rows_per_chunk(m->rows, m->width / 8, threads), threads, pool);
    return work.bad;
}

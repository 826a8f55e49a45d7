/* Every element is read once; the sums of a strip of columns stay in the closest cache while its rows pass by. */
#include "columns.h"

#include "packed_rows.h"

enum { STRIP = 512, ROWS = 1024, AT_ONCE = 8 };

INLINE float square_at(int kind, const void *x, int64_t index) {
    const float value = load_value(kind, x, index);
    return value * value;
}

INLINE void add_strip(const column_squares *c, int64_t column, int64_t width, const int kind) {
    const int64_t stride = c->row_stride;
    float *out = c->out + column;
    for (int64_t start = 0; start < c->rows; start += ROWS) {
        const int64_t stop = c->rows - start < ROWS ? c->rows : start + ROWS;
        float sums[STRIP] = {0};
        int64_t row = start;
        for (; row + AT_ONCE <= stop; row += AT_ONCE) { /* the sums are loaded and stored once for so many rows */
            const int64_t at = row * stride + column;
            for (int64_t j = 0; j < width; j++) {
                float sum = 0;
                for (int r = 0; r < AT_ONCE; r++) sum += square_at(kind, c->x, at + r * stride + j);
                sums[j] += sum;
            }
        }
        for (; row < stop; row++)
            for (int64_t j = 0; j < width; j++) sums[j] += square_at(kind, c->x, row * stride + column + j);
        for (int64_t j = 0; j < width; j++) out[j] += sums[j];
    }
}

INLINE void add_strips(const column_squares *c, int64_t first, int64_t last) {
    for (int64_t strip = first; strip < last; strip++) {
        const int64_t column = strip * STRIP, width = c->width - column < STRIP ? c->width - column : STRIP;
        if (c->kind == KIND_BF16)
            add_strip(c, column, width, KIND_BF16);
        else
            add_strip(c, column, width, KIND_F32);
    }
}

static void portable_squares(void *c, int64_t first, int64_t last) { add_strips(c, first, last); }

#ifdef WANDA_X86
__attribute__((target("avx2"))) static void avx2_squares(void *c, int64_t first, int64_t last) {
    add_strips(c, first, last);
}
TARGET_WIDE static void avx512_squares(void *c, int64_t first, int64_t last) {
    add_strips(c, first, last);
}
#endif

void add_column_squares(const column_squares *c, int level, int threads, gomp_parallel pool) {
    chunk_function work = portable_squares;
#ifdef WANDA_X86
    work = level >= LEVEL_AVX512 ? avx512_squares : level == LEVEL_AVX2 ? avx2_squares : work;
#else
    (void)level;
#endif
    parallel_for(work, (void *)c, (c->width + STRIP - 1) / STRIP, 1, threads, pool);
}

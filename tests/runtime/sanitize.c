/* Runs every kernel of this machine over exactly sized buffers, to be compiled with sanitizers; 0 when all sums agree. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "amx.h"
#include "columns.h"
#include "gram.h"
#include "numbers.h"
#include "packed.h"
#include "select.h"

static uint64_t state = 88172645463325252u;

static uint64_t next_random(void) {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

static float uniform(void) { return (float)(next_random() % 2001) / 1000.0f - 1.0f; }

static void put(int kind, void *to, int64_t at, float value) {
    if (kind == KIND_F32)
        ((float *)to)[at] = value;
    else
        ((uint16_t *)to)[at] = kind == KIND_BF16 ? to_bf16(value) : to_f16(value);
}

static float get(int kind, const void *from, int64_t at) {
    if (kind == KIND_F32) return ((const float *)from)[at];
    const uint16_t bits = ((const uint16_t *)from)[at];
    return kind == KIND_BF16 ? from_bf16(bits) : from_f16(bits);
}

static int compare(const product *p, const void *dense, const char *what, int level) {
    const double step = p->kind == KIND_F32 ? 1e-4 : p->kind == KIND_F16 ? 1e-3 : 8e-3;
    for (int64_t c = 0; c < p->columns; c++)
        for (int64_t row = 0; row < p->m.rows; row++) {
            double sum = p->bias ? get(p->kind, p->bias, row) : 0;
            for (int64_t j = 0; j < p->m.width; j++)
                sum += (double)get(p->m.kind, dense, row * p->m.width + j) * get(p->kind, p->x, c * p->x_stride + j);
            const double found = get(p->kind, p->out, c * p->out_stride + row);
            if (fabs(found - sum) > step * (1 + fabs(sum))) {
                printf("%s: level %d kinds %d %d %lldx%lld columns %lld: %g, not %g\n", what, level, p->m.kind, p->kind,
                       (long long)p->m.rows, (long long)p->m.width, (long long)p->columns, found, sum);
                return 1;
            }
        }
    return 0;
}

/* kind: of the matrix; own: the inputs have it too, and not KIND_F32. */
static int one(int kind, int own, int64_t rows, int64_t width, int64_t columns, int percent) {
    const int inputs = own ? kind : KIND_F32;
    const size_t size = kind == KIND_F32 ? 4 : 2, wide = inputs == KIND_F32 ? 4 : 2;
    const int64_t words = (width + 63) / 64;
    int wrong = 0;
    char *dense = calloc((size_t)(rows * width) + 1, size), *again = malloc((size_t)(rows * width) * size + 1);
    char *x = malloc((size_t)(columns * width) * wide), *out = malloc((size_t)(columns * rows) * wide);
    char *bias = malloc((size_t)rows * wide), *floats = malloc((size_t)(rows * width) * 4 + 1);
    uint64_t *mask = malloc((size_t)(rows * words) * 8);
    uint32_t *counts = malloc((size_t)rows * 4), *offsets = malloc((size_t)(rows + 1) * 4);
    for (int64_t i = 0; i < rows * width; i++)
        if ((int)(next_random() % 100) < percent) put(kind, dense, i, uniform());
    for (int64_t i = 0; i < columns * width; i++) put(inputs, x, i, uniform());
    for (int64_t i = 0; i < rows; i++) put(inputs, bias, i, uniform());
    mark_survivors(kind, rows, width, dense, mask, counts, 2, 0);
    offsets[0] = 0;
    for (int64_t i = 0; i < rows; i++) offsets[i + 1] = offsets[i] + counts[i];
    const int64_t capacity = offsets[rows] + SLACK;
    char *values = calloc((size_t)capacity, size);
    matrix m = {kind, rows, width, mask, offsets, values};
    gather_survivors(&m, dense, values, 2, 0);
    wrong |= first_bad_row(&m, capacity, 2, 0) >= 0;
    wrong |= first_bad_row(&m, capacity - 1, 2, 0) < 0;
    for (int level = 0; level <= best_level(); level++) {
        expand_rows(&m, 0, rows, kind, again, level, 2, 0);
        wrong |= memcmp(dense, again, (size_t)(rows * width) * size) != 0;
        expand_rows(&m, 0, rows, KIND_F32, floats, level, 2, 0);
        for (int64_t i = 0; i < rows * width; i++) wrong |= get(KIND_F32, floats, i) != get(kind, dense, i);
        product p = {m, inputs, x, width, columns, out, rows, columns % 2 ? bias : NULL};
        const int tiles = level >= LEVEL_AVX512_BF16 && kind == KIND_BF16 && inputs == KIND_BF16;
        if (columns <= MOST_COLUMNS) {
            matrix_product(&p, level, 2, 0);
            wrong |= compare(&p, dense, "rows", level);
        }
        if (level == LEVEL_AVX2 || level == LEVEL_AVX512) { /* those above have the latter's */
            matrix_product_spmm(&p, level, 2, 0);
            wrong |= compare(&p, dense, "spmm", level);
        }
        if (tiles) {
            const int amx = level >= LEVEL_AMX;
            (amx ? matrix_product_amx : matrix_product_tiled)(&p, 2, 0);
            wrong |= compare(&p, dense, amx ? "AMX" : "tiles", level);
            p.m.mask = NULL;
            p.m.offsets = NULL;
            p.m.values = dense;
            if (columns <= MOST_COLUMNS) {
                matrix_product(&p, level, 2, 0);
                wrong |= compare(&p, dense, "dense rows", level);
            }
            (amx ? matrix_product_amx : matrix_product_tiled)(&p, 2, 0);
            wrong |= compare(&p, dense, amx ? "dense AMX" : "dense tiles", level);
        }
    }
    free(dense), free(again), free(x), free(out), free(bias), free(mask), free(counts), free(offsets), free(values);
    free(floats);
    return wrong;
}

static int token_products(int64_t tokens, int64_t rows, int64_t columns, int level) {
    uint16_t *a = malloc((size_t)(tokens * rows) * 2), *b = malloc((size_t)(tokens * columns) * 2);
    float *out = malloc((size_t)(rows * columns) * 4);
    for (int64_t i = 0; i < tokens * rows; i++) a[i] = to_bf16(uniform());
    for (int64_t i = 0; i < tokens * columns; i++) b[i] = to_bf16(uniform());
    for (int64_t i = 0; i < rows * columns; i++) out[i] = 1;
    token_product p = {tokens, rows, columns, a, rows, b, columns, out, columns, 0};
    int wrong = add_token_product(&p, level, 2, 0);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) {
            double sum = 1;
            for (int64_t t = 0; t < tokens; t++) sum += (double)from_bf16(a[t * rows + i]) * from_bf16(b[t * columns + j]);
            if (fabs(out[i * columns + j] - sum) > 1e-4 * (1 + fabs(sum))) {
                printf("token product: %g, not %g\n", out[i * columns + j], sum);
                wrong = 1;
            }
        }
    if (rows == columns) {
        p.upper = 1;
        wrong |= add_token_product(&p, level, 2, 0);
    }
    free(a), free(b), free(out);
    return wrong;
}

#ifdef WANDA_AMX
/* Other libraries shape tiles once and count on it: a product leaves them as it found them, or without shapes. */
TARGET_AMX static int tiles_are_put_back(int shaped) {
    tile_shapes own = {{0}}, found;
    if (shaped) own.bytes[0] = 1, own.bytes[16] = 8, own.bytes[48] = 3, own.bytes[30] = 64, own.bytes[55] = 16;
    load_shapes(&own);
    int wrong = token_products(40, 40, 40, LEVEL_AMX) | one(KIND_BF16, 1, 40, 70, 5, 50);
    store_shapes(&found);
    wrong |= memcmp(&own, &found, sizeof own) != 0;
    const tile_shapes none = {{0}};
    load_shapes(&none);
    if (wrong) printf("tiles: not as they were\n");
    return wrong;
}
#endif

static int selections(int64_t rows, int64_t n, int levels) {
    float *scores = malloc((size_t)(rows * n) * 4), *sums = calloc((size_t)n, 4);
    uint8_t *marked = malloc((size_t)(rows * n));
    int64_t *counts = malloc((size_t)rows * 8);
    int wrong = 0;
    for (int64_t i = 0; i < rows * n; i++) scores[i] = (float)(next_random() % (uint64_t)levels) - 2;
    for (int64_t i = 0; i < rows; i++) counts[i] = (int64_t)(next_random() % (uint64_t)(n + 1));
    for (int level = 0; level <= best_level(); level++) {
        const selection s = {rows, n, scores, n, counts, 1, marked};
        for (int few = 0; few <= (n <= 32); few++) {
            (few ? mark_lowest_of_few : mark_lowest)(&s, level, 2, 0);
            for (int64_t row = 0; row < rows; row++) {
                int64_t count = 0;
                for (int64_t j = 0; j < n; j++) count += marked[row * n + j];
                wrong |= count != counts[row];
            }
        }
        const column_squares c = {KIND_F32, rows, n, scores, n, sums};
        add_column_squares(&c, level, 2, 0);
    }
    clear_lost(4, rows, n, scores, n, marked, 2, 0);
    clear_lost(2, rows, n, scores, n, marked, 2, 0);
    if (wrong) printf("selection: wrong counts of %lldx%lld\n", (long long)rows, (long long)n);
    free(scores), free(sums), free(marked), free(counts);
    return wrong;
}

int main(void) {
    const int64_t widths[] = {1, 65, 200, 1030}, heights[] = {1, 49, 150}, columns[] = {1, 5, 16, 17, 70, 150};
    const int percents[] = {0, 3, 50, 100};
    int wrong = 0;
    for (int level = LEVEL_AVX512_BF16; level <= best_level(); level++)
        wrong |= token_products(7, 13, 70, level) | token_products(1, 1, 1, level) | token_products(130, 97, 97, level) |
                 token_products(1100, 64, 200, level);
#ifdef WANDA_AMX
    if (best_level() >= LEVEL_AMX) wrong |= tiles_are_put_back(0) | tiles_are_put_back(1);
#endif
    for (int kind = 0; kind < KINDS; kind++)
        for (int w = 0; w < 4; w++)
            for (int h = 0; h < 3; h++)
                for (int c = 0; c < 6; c++)
                    for (int s = 0; s < 4; s++)
                        for (int own = kind == KIND_F32; own < 2; own++)
                            wrong |= one(kind, own, heights[h], widths[w], columns[c], percents[s]);
    wrong |= selections(3, 1, 5) | selections(50, 7, 9) | selections(9, 700, 100000) | selections(1, 40000, 1 << 30) |
             selections(1, 40000, 3);
    return wrong;
}

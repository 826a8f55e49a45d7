/* Products over tokens of bfloat16 inputs, summed in float32: Gram matrices and their like. */
#ifndef WANDA_GRAM_H
#define WANDA_GRAM_H

#include <stdint.h>

#include "parallel.h"

/* out[i, j] += sum over tokens t of a[t, i] b[t, j]; a [tokens, rows], b [tokens, columns] bfloat16, out float32;
   strides in elements. upper: at least the entries with i <= j are added to, others may be. The sums do not depend on
   the number of threads. 0, or -1 when memory is short. */
typedef struct {
    int64_t tokens, rows, columns;
    const uint16_t *a;
    int64_t a_stride;
    const uint16_t *b;
    int64_t b_stride;
    float *out;
    int64_t out_stride;
    int upper;
} token_product;

/* Only from LEVEL_AVX512_BF16 on. */
int add_token_product(const token_product *p, int level, int threads, gomp_parallel pool);

/* Only at LEVEL_AMX. */
int add_token_product_amx(const token_product *p, int threads, gomp_parallel pool);

#endif

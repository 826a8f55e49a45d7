/* Sums over the columns of a matrix, accumulated in float32. */
#ifndef WANDA_COLUMNS_H
#define WANDA_COLUMNS_H

#include <stdint.h>

#include "parallel.h"

/* out[j] += sum over rows i of x[i, j]^2; x [rows, width] of the kind KIND_BF16 or KIND_F32, row_stride in elements.
   Sums of 1024 rows are added up first. The order of the sums does not depend on the number of threads. */
typedef struct {
    int kind;
    int64_t rows, width;
    const void *x;
    int64_t row_stride;
    float *out;
} column_squares;

void add_column_squares(const column_squares *c, int level, int threads, gomp_parallel pool);

#endif

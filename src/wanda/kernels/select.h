/* Which scores of a row are the lowest, as a stable ascending sort would have it: ties go by position, earlier first. */
#ifndef WANDA_SELECT_H
#define WANDA_SELECT_H

#include <stdint.h>

#include "parallel.h"

/* scores [rows, n] float32, NaN ranks last; row_stride in elements. counts: how many of each row, [rows], or one for
   all of them where count_step is 0. marked [rows, n]: 1 for the lowest, 0 for the others. */
typedef struct {
    int64_t rows, n;
    const float *scores;
    int64_t row_stride;
    const int64_t *counts;
    int64_t count_step;
    uint8_t *marked;
} selection;

void mark_lowest(const selection *s, int level, int threads, gomp_parallel pool);

/* The same for rows of a few entries (n at most 32, no NaN), by comparing each with the others. */
void mark_lowest_of_few(const selection *s, int level, int threads, gomp_parallel pool);

/* Sets to zero bits what is not kept: values [rows, n] of `size` bytes (2 or 4) each, kept [rows, n] 0 or 1. */
void clear_lost(int size, int64_t rows, int64_t n, void *values, int64_t row_stride, const uint8_t *kept, int threads,
                gomp_parallel pool);

#endif

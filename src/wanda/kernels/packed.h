/* Matrices stored as surviving values, a bit mask and row offsets (docs/packed-format.md), and products with them. */
#ifndef WANDA_PACKED_H
#define WANDA_PACKED_H

#include <stdint.h>

#include "level.h"
#include "parallel.h"

enum { KIND_BF16, KIND_F16, KIND_F32, KINDS };
enum { MOST_COLUMNS = 16, /* of the matrix-vector kernels */
       AMX_COLUMNS = 5,   /* above that many AMX is faster with a packed matrix, where there is AMX, */
       FEW_COLUMNS = 8,   /* above these with a dense one, and the tiled product of vectors, */
       SOME_COLUMNS = 12, /* and above these, at LEVEL_AVX2, the one that skips zeros, where that pays */
       SLACK = 32 };      /* readable values behind the last one, so that whole vectors can be loaded */

/* values: the survivors row by row; or, with mask == NULL, all [rows, width] values of a dense matrix. */
typedef struct {
    int kind;
    int64_t rows, width;
    const uint64_t *mask;    /* [rows, (width + 63) / 64], bit j % 64 of word j / 64 is column j */
    const uint32_t *offsets; /* [rows + 1] into values */
    const void *values;
} matrix;

/* out[c, r] = sum over j of matrix[r, j] x[c, j], plus bias[r], accumulated in float32.
   x, out and bias have one kind: the matrix's, or KIND_F32; strides are in elements. */
typedef struct {
    matrix m;
    int kind;
    const void *x;
    int64_t x_stride, columns;
    void *out;
    int64_t out_stride;
    const void *bias; /* [rows] or NULL */
} product;

/* Whether few enough weights survive that the product which skips the others is as fast as what there is otherwise
   (docs/runtime.md): 70%, and from LEVEL_AVX512 on, where it is loading that binds, 60%. */
int skipping_pays(const matrix *m, int level);

/* 0, or -1 when memory is short. Up to MOST_COLUMNS columns; any number from LEVEL_AVX2 on. A dense matrix only where
   there is a tiled product. */
int matrix_product(const product *p, int level, int threads, gomp_parallel pool);

/* Writes rows [first, last) as dense [last - first, width] elements of a kind: the matrix's, or KIND_F32. */
void expand_rows(const matrix *m, int64_t first, int64_t last, int kind, void *out, int level, int threads,
                 gomp_parallel pool);

/* The first row whose offsets, mask bits and column bound do not fit together, or -1 when all do and no kernel can
   read beyond `capacity` values. */
int64_t first_bad_row(const matrix *m, int64_t capacity, int threads, gomp_parallel pool);

/* Writes mask [rows, (width + 63) / 64] and counts [rows]: which weights of dense [rows, width] are not all zero bits. */
void mark_survivors(int kind, int64_t rows, int64_t width, const void *dense, uint64_t *mask, uint32_t *counts,
                    int threads, gomp_parallel pool);

/* Writes the survivors of dense [rows, width] that m's mask marks to where m's offsets say. */
void gather_survivors(const matrix *m, const void *dense, void *values, int threads, gomp_parallel pool);

/* out [columns, rows] for any number of columns, x and out bfloat16: tiles are expanded into cache and multiplied
   there. Only from LEVEL_AVX512_BF16 on with KIND_BF16. 0, or -1 where it is not compiled. */
int matrix_product_tiled(const product *p, int threads, gomp_parallel pool);

/* The same with AMX. Only at LEVEL_AMX with KIND_BF16. 0, or -1 when memory is short or it is not compiled. */
int matrix_product_amx(const product *p, int threads, gomp_parallel pool);

/* out [columns, rows] for any number of columns and any kind: removed weights are skipped, survivors multiplied in
   float32, by the instructions of a level. Only from LEVEL_AVX2 on, and not for dense matrices. 0, or -1 where it is not
   compiled. */
int matrix_product_spmm(const product *p, int level, int threads, gomp_parallel pool);

#endif

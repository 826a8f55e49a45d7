/* What the driver in packed.c shares with the kernels of each instruction set. */
#ifndef WANDA_PACKED_ROWS_H
#define WANDA_PACKED_ROWS_H

#include "numbers.h"
#include "packed.h"

/* A product of at most MOST_COLUMNS columns whose x lies as the kernels want it: in pieces of `lane` elements, all
   columns of a piece side by side ([words * 64 / lane, columns, lane]), zero beyond the width; in each piece the
   elements at even places before those at odd ones where the kernel is `split`. */
typedef struct {
    const product *p;
    const void *x;
    int64_t words; /* 64-bit mask words in a row */
    int columns;   /* a size the kernels are compiled for; those beyond the product's own are zero */
    int stored;    /* the product's own */
} rows_job;

typedef void (*rows_kernel)(const rows_job *job, int64_t first, int64_t last);

void portable_rows(const rows_job *job, int64_t first, int64_t last);
/* One row as dense elements of a kind: the matrix's, or KIND_F32. */
typedef void (*expand_kernel)(const matrix *m, int64_t row, int kind, void *out);

void portable_expand(const matrix *m, int64_t row, int kind, void *out);
int64_t portable_count(const uint64_t *mask, int64_t words);

#ifdef WANDA_X86
void avx2_rows(const rows_job *job, int64_t first, int64_t last);
void avx2_expand(const matrix *m, int64_t row, int kind, void *out);
int64_t avx2_count(const uint64_t *mask, int64_t words);
void avx512_rows(const rows_job *job, int64_t first, int64_t last);
void avx512_expand(const matrix *m, int64_t row, int kind, void *out);
#endif
#ifdef WANDA_BF16
void avx512_bf16_rows(const rows_job *job, int64_t first, int64_t last);
void avx512_bf16_expand(const matrix *m, int64_t row, int kind, void *out);
#endif

INLINE const void *value_at(const matrix *m, int64_t index) {
    return (const char *)m->values + index * (m->kind == KIND_F32 ? 4 : 2);
}

INLINE float load_value(int kind, const void *values, int64_t index) {
    if (kind == KIND_F32) return ((const float *)values)[index];
    uint16_t bits = ((const uint16_t *)values)[index];
    return kind == KIND_BF16 ? from_bf16(bits) : from_f16(bits);
}

INLINE void store_value(int kind, void *values, int64_t index, float value) {
    if (kind == KIND_F32)
        ((float *)values)[index] = value;
    else
        ((uint16_t *)values)[index] = kind == KIND_BF16 ? to_bf16(value) : to_f16(value);
}

INLINE void store_row(const rows_job *job, int64_t row, const float *sums) {
    const product *p = job->p;
    float bias = p->bias ? load_value(p->kind, p->bias, row) : 0.0f;
    for (int c = 0; c < job->stored; c++) store_value(p->kind, p->out, c * p->out_stride + row, sums[c] + bias);
}

/* Calls body(job, first, last, kind, columns) with both as constants, so that it is compiled for each. */
#define FOR_FEW_COLUMNS(body, kind)                                \
    switch (job->columns) {                                        \
        case 1: body(job, first, last, kind, 1); break;            \
        case 2: body(job, first, last, kind, 2); break;            \
        case 3: body(job, first, last, kind, 3); break;            \
        case 4: body(job, first, last, kind, 4); break;            \
        case 6: body(job, first, last, kind, 6); break;            \
        case 8: body(job, first, last, kind, 8); break;            \
    }
#define FOR_COLUMNS(body, kind)                                    \
    switch (job->columns) {                                        \
        case 12: body(job, first, last, kind, 12); break;          \
        case 16: body(job, first, last, kind, 16); break;          \
        default: FOR_FEW_COLUMNS(body, kind)                       \
    }
#define FOR_KINDS_AND_COLUMNS(body)                                \
    switch (job->p->m.kind) {                                      \
        case KIND_BF16: FOR_COLUMNS(body, KIND_BF16); break;       \
        case KIND_F16: FOR_COLUMNS(body, KIND_F16); break;         \
        default: FOR_COLUMNS(body, KIND_F32); break;               \
    }

#endif

/* From dense to packed: which bits are not all zero, then the survivors themselves. */
#include "packed_rows.h"

typedef struct {
    const void *dense;
    int64_t width;
    int kind;
    uint64_t *mask;
    uint32_t *counts;
    const uint32_t *offsets;
    void *values;
} pack_work;

static void mark_rows(void *context, int64_t first, int64_t last) {
    const pack_work *work = context;
    const int64_t width = work->width, words = (width + 63) / 64;
    for (int64_t row = first; row < last; row++) {
        const uint16_t *halves = (const uint16_t *)work->dense + row * width;
        const uint32_t *wholes = (const uint32_t *)work->dense + row * width;
        uint32_t survivors = 0;
        for (int64_t word = 0; word < words; word++) {
            const int64_t start = word * 64, count = width - start < 64 ? width - start : 64;
            uint64_t bits = 0;
            for (int64_t j = 0; j < count; j++)
                bits |= (uint64_t)(work->kind == KIND_F32 ? wholes[start + j] != 0 : halves[start + j] != 0) << j;
            work->mask[row * words + word] = bits;
            survivors += (uint32_t)__builtin_popcountll(bits);
        }
        work->counts[row] = survivors;
    }
}

static void gather_rows(void *context, int64_t first, int64_t last) {
    const pack_work *work = context;
    const int64_t width = work->width, words = (width + 63) / 64;
    for (int64_t row = first; row < last; row++) {
        const uint64_t *mask = work->mask + row * words;
        int64_t at = work->offsets[row];
        for (int64_t word = 0; word < words; word++) {
            const int64_t start = row * width + word * 64;
            for (uint64_t bits = mask[word]; bits; bits &= bits - 1) {
                const int64_t from = start + __builtin_ctzll(bits);
                if (work->kind == KIND_F32)
                    ((uint32_t *)work->values)[at++] = ((const uint32_t *)work->dense)[from];
                else
                    ((uint16_t *)work->values)[at++] = ((const uint16_t *)work->dense)[from];
            }
        }
    }
}

void mark_survivors(int kind, int64_t rows, int64_t width, const void *dense, uint64_t *mask, uint32_t *counts,
                    int threads, gomp_parallel pool) {
    pack_work work = {.dense = dense, .width = width, .kind = kind, .mask = mask, .counts = counts};
    parallel_for(mark_rows, &work, rows, rows / (8 * threads) + 1, threads, pool);
}

void gather_survivors(const matrix *m, const void *dense, void *values, int threads, gomp_parallel pool) {
    pack_work work = {.dense = dense,
                      .width = m->width,
                      .kind = m->kind,
                      .mask = (uint64_t *)m->mask,
                      .offsets = m->offsets,
                      .values = values};
    parallel_for(gather_rows, &work, m->rows, m->rows / (8 * threads) + 1, threads, pool);
}

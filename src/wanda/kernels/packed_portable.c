/* Plain C: visits the set bits of the mask one by one. */
#include "packed_rows.h"

INLINE void rows(const rows_job *job, int64_t first, int64_t last, const int kind, const int columns) {
    const matrix *m = &job->p->m;
    const float *x = job->x; /* [words * 64, columns] */
    for (int64_t row = first; row < last; row++) {
        const uint64_t *mask = m->mask + row * job->words;
        int64_t at = m->offsets[row];
        float sums[MOST_COLUMNS] = {0}, odd[MOST_COLUMNS] = {0}; /* two chains, or the latency of the sums shows */
        for (int64_t word = 0; word < job->words; word++) {
            const float *piece = x + word * 64 * columns;
            for (uint64_t bits = mask[word]; bits; bits &= bits - 1) {
                const float value = load_value(kind, m->values, at++);
                const float *column = piece + __builtin_ctzll(bits) * columns;
                for (int c = 0; c < columns; c++) sums[c] += value * column[c];
                if (!(bits &= bits - 1)) break;
                const float other = load_value(kind, m->values, at++);
                column = piece + __builtin_ctzll(bits) * columns;
                for (int c = 0; c < columns; c++) odd[c] += other * column[c];
            }
        }
        for (int c = 0; c < columns; c++) sums[c] += odd[c];
        store_row(job, row, sums);
    }
}

void portable_rows(const rows_job *job, int64_t first, int64_t last) { FOR_KINDS_AND_COLUMNS(rows) }

int64_t portable_count(const uint64_t *mask, int64_t words) {
    int64_t count = 0;
    for (int64_t word = 0; word < words; word++) count += __builtin_popcountll(mask[word]);
    return count;
}

void portable_expand(const matrix *m, int64_t row, int kind, void *out) {
    const int64_t words = (m->width + 63) / 64;
    const uint64_t *mask = m->mask + row * words;
    int64_t at = m->offsets[row];
    memset(out, 0, (size_t)m->width * (kind == KIND_F32 ? 4 : 2));
    for (int64_t word = 0; word < words; word++) {
        for (uint64_t bits = mask[word]; bits; bits &= bits - 1, at++) {
            const int64_t column = word * 64 + __builtin_ctzll(bits);
            if (kind != KIND_F32)
                ((uint16_t *)out)[column] = ((const uint16_t *)m->values)[at];
            else if (m->kind == KIND_F32) /* not as a float: bits are kept */
                ((uint32_t *)out)[column] = ((const uint32_t *)m->values)[at];
            else
                ((float *)out)[column] = load_value(m->kind, m->values, at);
        }
    }
}

/* Reads memory as fast as it comes, for rooflines. */
#include "bandwidth.h"

typedef struct {
    const uint64_t *words;
    _Atomic uint64_t sum; /* kept so that the reading is not optimised away */
} read_work;

static void read_words(void *context, int64_t first, int64_t last) {
    read_work *work = context;
    uint64_t sums[32] = {0}; /* independent, so that the compiler uses vectors */
    int64_t i = first;
    for (; i + 32 <= last; i += 32)
        for (int j = 0; j < 32; j++) sums[j] ^= work->words[i + j];
    for (; i < last; i++) sums[0] ^= work->words[i];
    for (int j = 1; j < 32; j++) sums[0] ^= sums[j];
    work->sum ^= sums[0];
}

uint64_t read_memory(const uint64_t *words, int64_t count, int threads, gomp_parallel pool) {
    read_work work = {.words = words};
    parallel_for(read_words, &work, count, 1 << 15, threads, pool);
    return work.sum;
}

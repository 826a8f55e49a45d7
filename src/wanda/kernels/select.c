/* Floats in the order of their bits are integers: the threshold of a row is found by bisecting those, counting what
   lies below at every step. That takes at most 32 passes without a branch, over a row that stays in the cache; it ends
   early where a cut leaves exactly as many below as are wanted. A large row is narrowed down by a sample first. */
#include "select.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "numbers.h"
#include "packed_rows.h"

enum { LARGE = 1 << 14, SAMPLE = 1024, SPREAD = 80, FEW = 32 }; /* SPREAD: five standard deviations of a sample's rank */

INLINE int64_t order_of(float value) {
    const int64_t size = bits_of(value) & 0x7fffffff;
    return bits_of(value) >> 31 ? -size : size;
}

INLINE float value_of(int64_t order) {
    return order < 0 ? float_of(0x80000000u | (uint32_t)-order) : float_of((uint32_t)order);
}

INLINE int64_t count_below(const float *x, int64_t n, float cut) {
    int64_t total = 0;
    for (int64_t start = 0; start < n; start += 1 << 20) {
        const int64_t stop = n - start < 1 << 20 ? n : start + (1 << 20);
        int32_t count = 0;
        for (int64_t j = start; j < stop; j++) count += x[j] < cut;
        total += count;
    }
    return total;
}

typedef struct {
    float value;
    int64_t below; /* how many are less than the value: at most as many as wanted, which then are those and ties */
} threshold;

INLINE threshold bisect(const float *x, int64_t n, int64_t wanted) {
    int64_t low = order_of(-INFINITY), high = order_of(INFINITY), below = 0;
    const int64_t finite = count_below(x, n, INFINITY);
    if (finite <= wanted) return (threshold){INFINITY, finite};
    while (high - low > 1 && below < wanted) { /* below low: fewer than wanted; below high: more */
        const int64_t middle = low + (high - low) / 2, count = count_below(x, n, value_of(middle));
        if (count <= wanted)
            low = middle, below = count;
        else
            high = middle;
    }
    return (threshold){value_of(low), below};
}

/* Bisects what lies between two ranks of a sample, when the wanted one does; else the whole. */
INLINE threshold narrow(const float *x, int64_t n, int64_t wanted) {
    float sample[SAMPLE];
    const int64_t stride = n / SAMPLE, rank = wanted * SAMPLE / n;
    uint64_t random = 88172645463325252u;
    for (int64_t i = 0; i < SAMPLE; i++) {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        sample[i] = x[i * stride + (int64_t)(random % (uint64_t)stride)];
    }
    const float low = rank > SPREAD ? bisect(sample, SAMPLE, rank - SPREAD).value : -INFINITY;
    const float high = rank + SPREAD < SAMPLE ? bisect(sample, SAMPLE, rank + SPREAD).value : INFINITY;
    const int64_t below = count_below(x, n, low), between = count_below(x, n, high) - below;
    if (below == wanted) return (threshold){low, below};
    if (below + between == wanted) return (threshold){high, wanted};
    if (below > wanted || below + between < wanted || between > n / 2) return bisect(x, n, wanted);
    float *kept = malloc((size_t)(between + 1) * sizeof *kept);
    if (!kept) return bisect(x, n, wanted);
    int64_t count = 0;
    for (int64_t j = 0; j < n; j++) { /* one more is written than kept, over and over */
        kept[count] = x[j];
        count += (x[j] >= low) & (x[j] < high);
    }
    threshold found = bisect(kept, between, wanted - below);
    free(kept);
    found.below += below;
    return found;
}

INLINE void mark_rows(const selection *s, int64_t first, int64_t last) {
    const int64_t n = s->n;
    for (int64_t row = first; row < last; row++) {
        const float *x = s->scores + row * s->row_stride;
        uint8_t *marked = s->marked + row * n;
        const int64_t wanted = s->counts[row * s->count_step];
        if (wanted <= 0 || wanted >= n) {
            memset(marked, wanted > 0, (size_t)n);
            continue;
        }
        const threshold t = n >= LARGE ? narrow(x, n, wanted) : bisect(x, n, wanted);
        const float cut = t.value;
        for (int64_t j = 0; j < n; j++) marked[j] = x[j] < cut;
        int64_t left = wanted - t.below;
        for (int64_t j = 0; left > 0 && j < n; j++)
            if (x[j] == cut) marked[j] = 1, left--;
        for (int64_t j = 0; left > 0 && j < n; j++)
            if (isnan(x[j])) marked[j] = 1, left--;
    }
}

INLINE void mark_few(const selection *s, int64_t first, int64_t last, const int n) {
    for (int64_t row = first; row < last; row++) {
        const float *x = s->scores + row * s->row_stride;
        const int64_t wanted = s->counts[row * s->count_step];
        int rank[FEW] = {0};
        for (int j = 0; j < n; j++)
            for (int i = 0; i < n; i++) rank[i] += (x[j] < x[i]) | ((x[j] == x[i]) & (j < i));
        for (int i = 0; i < n; i++) s->marked[row * n + i] = rank[i] < wanted;
    }
}

INLINE void mark_few_rows(const selection *s, int64_t first, int64_t last) {
    switch (s->n) {
        case 4: mark_few(s, first, last, 4); break;
        case 8: mark_few(s, first, last, 8); break;
        default: mark_few(s, first, last, (int)s->n); break;
    }
}

static void portable_mark(void *s, int64_t first, int64_t last) { mark_rows(s, first, last); }
static void portable_few(void *s, int64_t first, int64_t last) { mark_few_rows(s, first, last); }

#ifdef WANDA_X86
__attribute__((target("avx2"))) static void avx2_mark(void *s, int64_t first, int64_t last) {
    mark_rows(s, first, last);
}
__attribute__((target("avx2"))) static void avx2_few(void *s, int64_t first, int64_t last) {
    mark_few_rows(s, first, last);
}
TARGET_WIDE static void avx512_mark(void *s, int64_t first, int64_t last) {
    mark_rows(s, first, last);
}
#endif

static int64_t rows_per_chunk(int64_t n) { return (1 << 15) / (n + 1) + 1; }

void mark_lowest(const selection *s, int level, int threads, gomp_parallel pool) {
    chunk_function work = portable_mark;
#ifdef WANDA_X86
    work = level >= LEVEL_AVX512 ? avx512_mark : level == LEVEL_AVX2 ? avx2_mark : work;
#else
    (void)level;
#endif
    parallel_for(work, (void *)s, s->rows, rows_per_chunk(s->n), threads, pool);
}

void mark_lowest_of_few(const selection *s, int level, int threads, gomp_parallel pool) {
    chunk_function work = portable_few;
#ifdef WANDA_X86
    if (level >= LEVEL_AVX2) work = avx2_few;
#else
    (void)level;
#endif
    parallel_for(work, (void *)s, s->rows, rows_per_chunk(s->n), threads, pool);
}

typedef struct {
    int size;
    int64_t n, row_stride;
    char *values;
    const uint8_t *kept;
} clearing;

static void clear_rows(void *context, int64_t first, int64_t last) {
    const clearing *c = context;
    for (int64_t row = first; row < last; row++) {
        const uint8_t *kept = c->kept + row * c->n;
        char *values = c->values + row * c->row_stride * c->size;
        if (c->size == 2)
            for (int64_t j = 0; j < c->n; j++) ((uint16_t *)values)[j] &= (uint16_t)-kept[j];
        else
            for (int64_t j = 0; j < c->n; j++) ((uint32_t *)values)[j] &= (uint32_t)-kept[j];
    }
}

void clear_lost(int size, int64_t rows, int64_t n, void *values, int64_t row_stride, const uint8_t *kept, int threads,
                gomp_parallel pool) {
    clearing c = {size, n, row_stride, values, kept};
    parallel_for(clear_rows, &c, rows, rows_per_chunk(n), threads, pool);
}
